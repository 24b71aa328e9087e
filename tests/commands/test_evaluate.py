"""`deepvit-eval`: partial and odd evaluations say so, and each result has a file of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from deepvit_train.commands import evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.models import DeepViT
from deepvit_train.training.validation import _is_best
from tests.conftest import QUICK, Command

FILES = "threads=1", "data.workers=0", "report=false"


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.run(compose_command("train", [*QUICK, f"run_dir={folder}", "trainer.ema_decay=0.9"]))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run", symlinks=True)


def evaluated(run: Path, *overrides: str) -> dict[str, object]:
    return evaluate.run(compose_command("eval", [f"checkpoint={run}", *FILES, *overrides]))


def written(run: Path) -> dict[str, dict[str, object]]:
    """The results beside the checkpoints of a run, by what follows the checkpoint's name."""
    files = sorted((run / "checkpoints").glob("step_*.json"))
    return {file.name.split(".", 1)[1]: json.loads(file.read_text()) for file in files}


@pytest.mark.runs
def test_a_limit_takes_every_class_and_the_result_is_marked(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluated(run)
    assert (whole["partial"], whole["images"], whole["of"]) == (False, 364, 364)
    capsys.readouterr()
    report = evaluated(run, "limit_batches=1", "batch_size=50")
    assert (report["partial"], report["images"], report["of"]) == (True, 50, 364)
    said = capsys.readouterr().out
    assert "val: 50 images of 364, so partial" in said
    assert "50 (partial)" in said
    results = written(run)
    assert list(results) == ["ema.val.json", "ema.val.partial50.json"]  # the whole one is left alone
    assert results["ema.val.json"]["top1"] == whole["top1"]
    partial = results["ema.val.partial50.json"]
    assert (partial["partial"], partial["images"], partial["of"]) == (True, 50, 364)
    assert [each["images"] for each in partial["classes"].values()] == [5] * 10


def test_a_class_without_an_image_is_unknown_and_not_the_worst(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(run, "limit_batches=1", "batch_size=4")
    said = capsys.readouterr().out
    classes = written(run)["ema.val.partial4.json"]["classes"]
    assert len(classes) == 10
    unseen = [each for each in classes.values() if not each["images"]]
    assert len(unseen) == 6
    assert all(each["top1"] is None for each in unseen)
    table = said[: said.index("images/s")]
    rows = [line for line in table.splitlines() if line.strip("│┃ ")[:1].isdigit()]
    assert len(rows) == 4
    assert "classes without an image: 6" in said


@pytest.mark.runs
def test_each_result_has_a_file_that_names_what_was_evaluated(run: Path, digits: Path) -> None:
    for number in (1, 2):
        shutil.copytree(digits / "val", run.parent / str(number) / "other digits" / "val")
    shutil.copytree(digits, run.parent / "digits")
    (run.parent / "digits" / "deep").mkdir()
    (run.parent / "digits" / "val").rename(run.parent / "digits" / "deep" / "val")
    evaluated(run)
    own = written(run)
    reports = [
        evaluated(run, *overrides)
        for overrides in (
            ["weights=live"],
            ["precision=bf16"],
            ["image_size=16"],  # its own
            ["image_size=24", "calibrate_images=16"],
            ["calibrate_images=16"],
            ["crop_pct=0.8"],
            ["data.split=train"],
            [f"data.root={run.parent / '1' / 'other digits'}"],
            [f"data.root={run.parent / '2' / 'other digits'}"],
            ["data=imagefolder", f"data.root={digits}"],
            [f"data.root={run.parent / 'digits'}", "data.split=deep/val"],
        )
    ]
    results = written(run)
    named = [name.rsplit("-", 1)[0] if "digits-" in name else name for name in results]
    assert sorted(named) == [
        "ema.deep-val-bd9403.digits-digits",
        "ema.train.json",
        "ema.val.24px.json",
        "ema.val.bf16.json",
        "ema.val.calibrated16.json",
        "ema.val.crop_pct-0.8.json",
        "ema.val.digits-other-digits",
        "ema.val.digits-other-digits",
        "ema.val.imagefolder-digits-v1",
        "ema.val.json",
        "live.val.json",
    ]
    speed = "images_per_s"
    assert results["ema.val.json"] | {speed: 0} == own["ema.val.json"] | {speed: 0}
    roots = {report["root"] for report in reports}
    assert {str(run.parent / number / "other digits") for number in "12"} <= roots
    assert all(result["root"] in roots for result in results.values())


@pytest.mark.runs
def test_the_runs_own_root_is_its_own_however_it_is_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    data = ["data=imagefolder", "data.root=images"]
    train.run(compose_command("train", [*QUICK, *data, "augment=digits", "run_dir=run"]))
    for root in ("images", str(tmp_path / "images"), "../" + tmp_path.name + "/images/"):
        evaluated(tmp_path / "run", "data=imagefolder", f"data.root={root}")
    evaluated(tmp_path / "run")
    assert list(written(tmp_path / "run")) == ["live.val.json"]


@pytest.fixture
def foreign(run: Path, tmp_path: Path) -> Path:
    """The weights of a run without the description, as another program may have saved them."""
    from deepvit_train.run.checkpoint import read_tensors

    torch.save(read_tensors(run / "checkpoints" / "last" / "model.safetensors"), tmp_path / "foreign.pth")
    return tmp_path / "foreign.pth"


@pytest.mark.parametrize("command", ["eval", pytest.param("analyze", marks=pytest.mark.runs)])
def test_what_is_assumed_of_a_foreign_file_is_told(call: Command, foreign: Path, command: str) -> None:
    more = ["collapse.images=4", "batch_size=4"] if command == "analyze" else []
    typed = [command, f"checkpoint={foreign}", *FILES, "data=digits", "crop_pct=0.8", *more]
    result = call(*typed)
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("preprocessing: ")]
    assert "16 pixels, mean=[0.5, 0.5, 0.5] std=[0.5, 0.5, 0.5] crop_pct=0.8 interpolation=bicubic" in line
    assert line.endswith("; assumed, as nobody said it: mean, std, interpolation")


def test_the_json_has_the_preprocessing(run: Path, foreign: Path) -> None:
    own, other = evaluated(run)["preprocessing"], evaluated(foreign, "data=digits")["preprocessing"]
    assert isinstance(own, dict)
    assert isinstance(other, dict)
    assert own.pop("assumed") == []
    assert other.pop("assumed") == ["mean", "std", "crop_pct", "interpolation"]
    assert set(own) == set(other) == {"image_size", "mean", "std", "crop_pct", "interpolation"}
    (file,) = foreign.parent.glob("foreign.pth.live.val.digits-*.json")
    assert json.loads(file.read_text())["preprocessing"]["crop_pct"] == 0.9


def test_outputs_that_are_not_finite_count_as_wrong_and_are_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = DeepViT.forward

    def broken(self: DeepViT, images: torch.Tensor) -> object:
        return forward(self, images) * float("nan")

    monkeypatch.setattr(DeepViT, "forward", broken)
    report = evaluated(run)
    assert (report["top1"], report["top5"], report["loss"], report["not_finite"]) == (0.0, 0.0, None, 364)
    said = capsys.readouterr().out
    assert "warning: outputs for 364 images are NaN or infinite; they count as wrong" in said
    assert json.loads(said.splitlines()[-1]) == report


def one_class(root: Path, *folders: str) -> Path:
    for split, count in (("train", 8), ("val", 2)):
        for folder in folders:
            (root / split / folder).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), (number, 0, 0)).save(root / split / folder / f"{number}.png")
    return root


SMALL = [*QUICK, "data=imagefolder", "augment=none", "trainer.batch_size=8", "run_dir=run"]


@pytest.mark.runs
def test_one_class_or_one_level_too_many_is_warned_of_at_the_start(call: Command, tmp_path: Path) -> None:
    result = call("train", *SMALL, f"data.root={one_class(tmp_path / 'images', 'all/cat', 'all/dog')}")
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    (warning,) = [line for line in said if line.startswith("warning: ")]
    assert "images/train: holds one class alone, all" in warning
    assert "all/ holds cat/, dog/" in warning
    assert said.index(warning) < min(number for number, line in enumerate(said) if line.startswith("step "))
    result = call("eval", "checkpoint=run", *FILES)
    assert "warning: " in result.stdout
    assert "images/val: holds one class alone, all" in result.stdout


def test_check_warns_of_one_class(call: Command, tmp_path: Path) -> None:
    root = one_class(tmp_path / "images", "cat")
    result = call("data-check", f"root={root}", "timing=false", "data.workers=0")
    warnings = json.loads(result.stdout.splitlines()[-1])["warnings"]
    assert len(warnings) == 2
    for split, warning in zip(("train", "val"), warnings, strict=True):
        assert warning.startswith(f"{root}/{split}: holds one class alone, cat")
    assert f"warning: {warnings[0]}" in result.stdout


@pytest.mark.runs
def test_a_limited_training_says_that_its_evaluations_are_partial(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [*QUICK, f"run_dir={tmp_path / 'run'}", "trainer.eval_batch_size=20", "trainer.limit_batches=5"]
    result = train.run(compose_command("train", typed))
    said = capsys.readouterr().out
    assert "evaluations are partial: 100 of 364 images, spread over the classes" in said
    # After each epoch, at the end, and with the best one.
    assert said.count("(partial: 100 of 364 images)") == 4
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored == result
    assert (stored["partial"], stored["images"], stored["of"]) == (True, 100, 364)
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert (state["metrics"]["val/images"], state["best"]["val/of"]) == (100, 364)
    assert not any("val_ema" in name for name in state["metrics"])


@pytest.mark.parametrize(
    ("evaluation", "best", "expected"),
    [
        ((0.5, None), None, True),
        ((0.5, None), (0.4, None), True),
        ((0.4, None), (0.5, None), False),
        ((0.5, 100), (0.4, 100), True),
        ((0.4, 100), (0.5, 100), False),
        ((0.9, 100), (0.5, None), False),  # a partial one never takes the place of a full one
        ((0.1, None), (0.5, 100), True),  # a full one always takes that of a partial one
        ((0.1, 200), (0.5, 100), True),  # another limit begins anew
    ],
)
def test_the_best_one_is_chosen_among_evaluations_of_as_many_images(
    evaluation: tuple[float, int | None], best: tuple[float, int | None] | None, expected: bool
) -> None:
    def metrics(top1: float, images: int | None) -> dict[str, float]:
        return {"val/top1": top1} | ({"val/images": images, "val/of": 364} if images else {})

    assert _is_best(metrics(*evaluation), metrics(*best) if best else {}, "val/top1") == expected


def test_the_page_explains_every_key_of_a_result(run: Path) -> None:
    evaluated(run)
    (found,) = written(run).values()
    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, flags=re.MULTILINE)
    explained = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert found.keys() <= explained
    assert explained - found.keys() == {"val_share", "group_by", "not_finite"}
    for part in ("labels", "preprocessing"):
        content = found[part]
        assert isinstance(content, dict)
        assert all(f"`{key}`" in page for key in content), part
