"""`deepvit-compare`: what is within noise and what is not, and which evaluations can't be compared."""

from __future__ import annotations

import csv
import json
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from deepvit_train.commands import compare
from deepvit_train.commands.compare_report import FLATTERED, Comparison
from deepvit_train.commands.compare_subject import load_subjects
from deepvit_train.commands.compare_verdict import pair_of
from deepvit_train.config.compose import compose_command
from deepvit_train.error import CheckpointError, ConfigError, DataError
from deepvit_train.evaluation.interval import holm, mcnemar, paired_difference
from deepvit_train.evaluation.row import Row, write_rows
from tests.commands.test_evaluate_report import assert_is_alone
from tests.conftest import QUICK, Command

IMAGES = 500
CLASSES = ("ant", "bee")
CONTENT: dict[str, Any] = {
    "weights": "live",
    "data": "imagefolder",
    "root": "/nowhere",
    "split": "val",
    "image_size": 16,
    "precision": "fp32",
    "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic"},
    "images": IMAGES,
    "of": IMAGES,
    "images_per_s": 100.0,
    "folder": "/nowhere/val",
    "index_digest": "0123abcd",
    "parameters": 1000,
    "estimates": {"accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}},
}


def make_run(folder: Path, right: np.ndarray, seed: int = 0, attn: str = "self", **config: Any) -> Path:
    """The evaluation of a run that tells these images right."""
    evaluation = folder / "evaluation" / "step_0000010.live.val"
    evaluation.mkdir(parents=True)
    rows = []
    for number, hit in enumerate(right.tolist()):
        label, other = CLASSES[number % 2], CLASSES[1 - number % 2]
        rows.append(Row(f"{label}/{number:04}.png", label, label if hit else other, 0.75, 0.3))
    write_rows(rows, evaluation)
    (evaluation / "evaluation.json").write_text(json.dumps(CONTENT | {"images": len(rows)}))
    nested = {
        "name": folder.name,
        "seed": seed,
        "model": {"depth": 4},
        "attn": {"kind": attn, "norm": None if attn == "self" else "batch"},
        "trainer": {"epochs": 10, "batch_size": 50},
    }
    nested["trainer"] |= config
    (folder / "config.yaml").write_text(yaml.safe_dump(nested))
    lines = [
        {"step": step, "train/loss": 1 / step, "train/images_per_s": 100.0, "train/memory_mib": 10.0 + step}
        for step in (1, 2, 40)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return evaluation


def arms(folder: Path, shares: dict[str, list[float]]) -> list[Path]:
    """Runs of several seeds of each arm."""
    return [
        make_run(folder / f"x-{name}-s{seed}", told(share, seed), seed, attn=name)
        for name, each in shares.items()
        for seed, share in enumerate(each)
    ]


def told(share: float, seed: int) -> np.ndarray:
    """Which images a model of this accuracy tells right. Easy images are easy for every model."""
    ease = np.random.default_rng(99).uniform(size=IMAGES)
    own = np.random.default_rng(seed).normal(scale=0.03, size=IMAGES)
    return ease + own < share


def compared(*runs: Path, **keys: str) -> dict[str, Any]:
    typed = [f"{key}={value}" for key, value in keys.items()]
    return compare.run(compose_command("compare", [*map(str, runs), *typed]))


def test_seeds_are_within_noise_and_a_shorter_training_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [make_run(tmp_path / f"long{seed}", told(0.9, seed), seed) for seed in range(2)]
    short = make_run(tmp_path / "short", told(0.8, 7), epochs=5)
    report = compared(*long, short)
    assert [pair["verdict"] for pair in report["pairs"]] == ["within noise", "worse"]
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == report
    assert "The difference between long1 and long0 is within noise" in said
    assert "short is worse than long0" in said
    page = Path(report["report"])
    assert page.parent.parent == tmp_path / "long0" / "comparison"
    assert page.parent.name.startswith("long1+short-")
    assert_is_alone(page.read_text())
    content = json.loads((page.parent / "comparison.json").read_text())
    assert content["configuration"] == {"seed": [0, 1, 0], "trainer.epochs": [10, 10, 5]}
    assert [group["runs"] for group in content["groups"]] == [["long0", "long1"], ["short"]]
    costs = [model["cost"] for model in content["models"]]
    assert costs[0] == {
        "parameters": 1000,
        "train_seconds": 20.0,
        "train_images_per_s": 100.0,
        "train_memory_mib": 50.0,
        "eval_images_per_s": 100.0,
    }
    pair, sides = content["pairs"][1], list(zip(told(0.9, 0), told(0.8, 7), strict=True))
    assert (pair["gained"], pair["lost"]) == (sides.count((False, True)), sides.count((True, False)))
    assert pair["p"] == mcnemar(pair["gained"], pair["lost"])
    assert pair["difference"] == paired_difference(pair["gained"], pair["lost"], IMAGES).plain()
    with (page.parent / "changed.csv").open() as file:
        changed = list(csv.DictReader(file))
    assert all(len({row["long0"], row["long1"], row["short"]}) == 2 for row in changed)
    assert len(changed) >= pair["gained"] + pair["lost"]


def test_a_clear_difference_of_seeds_is_still_noise(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(seed), told(0.9 - 0.1 * seed, seed), seed) for seed in range(2)]
    subjects = load_subjects(compose_command("compare", list(map(str, runs))))
    pair = pair_of(subjects[0], subjects[1])
    assert pair.is_clear
    assert pair.verdict == "within noise"
    assert "this is what seeds do" in pair.sentence()


def test_groups_of_seeds_are_compared_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = {"self": [0.90, 0.91, 0.89], "gated": [0.80, 0.81, 0.79], "mixed": [0.80, 0.82, 0.80]}
    report = compared(*arms(tmp_path, shares))
    over = {(each["first"], each["second"]): each for each in report["over_seeds"]}
    assert {names: each["verdict"] for names, each in over.items()} == {
        ("attn=self", "attn=gated"): "worse",
        ("attn=self", "attn=mixed"): "worse",
        ("attn=gated", "attn=mixed"): "within noise",
    }
    plain = [each["p"] for each in over.values()]
    assert [each["p_holm"] for each in over.values()] == holm(plain) != plain
    # Single checkpoints are compared with their like seeds, and nothing is said to be better of them.
    like = [(f"x-self-s{seed}", f"x-{arm}-s{seed}") for arm in ("gated", "mixed") for seed in range(3)]
    assert [(pair["first"], pair["second"]) for pair in report["pairs"]] == like
    assert {pair["verdict"] for pair in report["pairs"]} == {None}
    said, html = capsys.readouterr().out, unescape(Path(report["report"]).read_text())
    line = "Over seeds attn=gated (3 seeds: x-gated-s0, -s1, -s2) is worse than attn=self (3 seeds: x-self-s0"
    for shown in (said, html):
        assert shown.index(line) < shown.index("McNemar")
        assert "by chance alone" not in shown
    assert "<h1>attn=self, attn=gated, attn=mixed: on the same 500 images</h1>" in html
    assert "Which images does x-gated-s0 alone tell right?" in html
    assert html.index("Which configuration is better, over seeds?") < html.index("How good is each model?")
    content = json.loads((Path(report["report"]).parent / "comparison.json").read_text())
    group = content["groups"][1]
    assert group["mean"] == pytest.approx(np.mean(group["accuracies"]))
    assert group["deviation"] == pytest.approx(np.std(group["accuracies"], ddof=1))


def test_seeds_that_tie_are_told_so(tmp_path: Path) -> None:
    right = {name: told(share, 0) for name, share in (("self", 0.9), ("gated", 0.8))}
    runs = [
        make_run(tmp_path / f"{name}-{seed}", right[name], seed, name) for name in right for seed in (0, 1)
    ]
    (contest,) = _comparison(runs).contests
    assert (contest.verdict, contest.p) == ("no test", None)
    assert "within each of them all seeds have the same accuracy" in contest.sentence()
    assert compared(*runs)["over_seeds"][0]["p_holm"] is None


def test_a_configuration_is_called_what_sets_it_apart(tmp_path: Path) -> None:
    def names(*runs: Path) -> list[str]:
        return [group.name for group in _comparison(list(runs)).groups]

    plain, gated = (make_run(tmp_path / name, told(0.9, 0), attn=name) for name in ("self", "gated"))
    long = make_run(tmp_path / "long", told(0.9, 0), attn="gated", epochs=20)
    other = make_run(tmp_path / "other", told(0.9, 0), attn="gated", a=1, b=2, c=3, epochs=20)
    assert names(plain, gated) == ["attn=self", "attn=gated"]
    assert names(plain, long) == ["attn=self, trainer.epochs=10", "attn=gated, trainer.epochs=20"]
    assert names(gated, long) == ["trainer.epochs=10", "trainer.epochs=20"]
    assert names(plain, other)[0] == "attn=self, trainer.a=null, trainer.b=null and 2 more keys"
    alone = tmp_path / "alone"
    shutil.copytree(plain, alone)
    assert names(plain, alone) == ["self", "alone"]  # whose configuration nobody knows


def test_each_run_says_which_checkpoint_it_was_read_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / name, told(0.9, 0)) for name in "ab"]
    for name, links in (("a", {"best": 10, "last": 10}), ("b", {"last": 10})):
        for step in {*links.values()}:
            (tmp_path / name / "checkpoints" / f"step_{step:07}").mkdir(parents=True)
        for link, step in links.items():
            (tmp_path / name / "checkpoints" / link).symlink_to(f"step_{step:07}")
    comparison = _comparison(runs)
    assert [each.checkpoint for each in comparison.subjects] == ["best and last, step 10", "last, step 10"]
    page, said = Path(compared(*runs)["report"]).read_text(), capsys.readouterr().out
    assert said.count(FLATTERED) == page.count(FLATTERED) == 1
    (tmp_path / "a" / "checkpoints" / "best").unlink()
    assert not _comparison(runs).content()["notes"]


def test_rows_can_be_told_apart_on_60_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare.console, "width", 60)
    monkeypatch.setattr(compare.console, "soft_wrap", False)
    compared(*arms(tmp_path, {"reattention": [0.9, 0.91], "reattention_gated": [0.8, 0.82]}))
    said = capsys.readouterr().out
    assert "…" not in said
    tables = [line for line in said.splitlines() if line.startswith("│")]
    assert tables
    assert max(map(len, tables)) <= 60
    for number in range(1, 5):
        assert sum(line.startswith(f"│ {number}") for line in tables) >= 2


def _comparison(runs: list[Path]) -> Comparison:
    return Comparison.of(load_subjects(compose_command("compare", list(map(str, runs)))))


def test_equal_evaluations_differ_by_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, told(0.9, 0)) for name in "ab"]
    (pair,) = compared(*runs, out=str(tmp_path / "out"))["pairs"]
    assert (pair["p"], pair["difference"]["value"], pair["verdict"]) == (1.0, 0.0, "within noise")
    assert (tmp_path / "out" / "report.html").is_file()


def test_each_set_of_runs_has_a_folder_of_its_own(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", told(0.9, 0))
    others = [make_run(tmp_path / place / "b", told(0.8, 1)) for place in ("here", "there")]
    pages = [compared(first, other)["report"] for other in (*others, others[0])]
    assert pages[0] == pages[2] != pages[1]
    shutil.move(tmp_path, moved := tmp_path.with_name("moved"))
    again = [moved / run.relative_to(tmp_path) for run in (first, others[0])]
    assert Path(compared(*again)["report"]).parent.name == Path(pages[0]).parent.name


def test_unlike_images_are_refused_with_the_reason(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", told(0.9, 0))
    fewer = make_run(tmp_path / "b", told(0.9, 0)[:100])
    with pytest.raises(
        DataError, match=r"500 images in /nowhere/val.*100 images.*ant/0100.png is in a alone"
    ):
        compared(first, fewer)
    other = make_run(tmp_path / "c", told(0.9, 0))
    rows = other / "predictions.csv"
    rows.write_text(rows.read_text().replace("ant/0002.png,ant", "ant/0002.png,wasp"))
    with pytest.raises(DataError, match=r"ant/0002.png is 'ant' for one and 'wasp' for the other"):
        compared(first, other)


def test_what_is_damaged_or_given_twice_is_told(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / name, told(0.9, 0)) for name in "ab")
    folder = second
    with pytest.raises(ConfigError, match="is given twice"):
        compared(first, first)
    with pytest.raises(ConfigError, match="give two or more"):
        compared(first)
    with pytest.raises(DataError, match="are one"):
        compared(folder, Path(f"{folder.parent}/../evaluation/{folder.name}"))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        compared(folder, tmp_path / "nowhere")
    (folder / "evaluation.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"evaluation.json: damaged \(the content has no"):
        compared(first, folder)


def test_paths_alone_are_runs_however_odd_they_are() -> None:
    odd = ["runs/lr=0.1,x (1)", "größe#1", "it's", 'a"b', "x\\y", "[z]"]
    assert compose_command("compare", odd).runs == odd
    assert compose_command("compare", ["runs=[a,b]"]).runs == ["a", "b"]
    with pytest.raises(ConfigError, match="runs is given already"):
        compose_command("compare", ["a", "runs=[b,c]"])
    with pytest.raises(ConfigError, match="runs is not given"):
        compose_command("compare", [])


@pytest.mark.runs
def test_runs_without_an_evaluation_are_evaluated(call: Command, tmp_path: Path) -> None:
    assert call("train", *QUICK, "run_dir=a").returncode == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    done = call("compare", "a", "b", "threads=1")
    assert done.returncode == 0, done.stderr
    assert "a: not evaluated yet" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["pairs"][0]["verdict"] == "within noise"
    assert report["images"] == 364
    again = call("compare", "a", "b")
    assert "not evaluated yet" not in again.stdout
    assert json.loads(again.stdout.splitlines()[-1]) == report
    (file,) = (tmp_path / "a" / "comparison").glob("b-*/report.html")
    page = file.read_text()
    assert "How did they train?" in page
    assert_is_alone(page)
