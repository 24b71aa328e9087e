"""The report of an evaluation: one file without requests, and numbers that are those of the evaluation."""

from __future__ import annotations

import csv
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from deepvit_train.commands import evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.evaluation.prediction import Predictions
from tests.conftest import QUICK, Command, as_ranks
from tests.evaluation.synthetic import build_report, draw_predictions, predictions_of

FILES = "threads=1", "data.workers=0"


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reported") / "run"
    train.run(compose_command("train", [*QUICK, f"run_dir={folder}"]))
    return folder


def report_of(run: Path) -> tuple[Path, dict[str, object]]:
    (folder,) = (run / "evaluation").glob("*.live.val")
    return folder, json.loads((folder / "evaluation.json").read_text())


def test_the_report_says_what_the_evaluation_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate.run(compose_command("eval", [f"checkpoint={run}", *FILES]))
    said = capsys.readouterr().out
    folder, content = report_of(run)
    assert f"read: {folder / 'report.html'}" in said
    assert json.loads(said.splitlines()[-1]) == found
    (beside,) = (run / "checkpoints").glob("step_*.json")
    assert f"{beside.stem}" == folder.name  # the same name says what was evaluated
    assert {key: content[key] for key in found} == found
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["images"] == 364
    right = [row["class"] == row["prediction"] for row in rows]
    assert (
        sum(right) / len(right) == pytest.approx(found["top1"]) == content["estimates"]["accuracy"]["value"]
    )
    assert sum(float(row["loss"]) for row in rows) / 364 == pytest.approx(found["loss"], rel=1e-5)
    stored = json.loads(beside.read_text())["classes"]
    for name, figures in content["classes"].items():
        assert figures["recall"] == pytest.approx(stored[name]["top1"])
        assert figures["support"] == stored[name]["images"]
    assert {file.name for file in folder.iterdir()} >= {
        "report.html",
        "confusion.png",
        "reliability.png",
        "losses.png",
        "classes.png",
        "images",
    }
    page = (folder / "report.html").read_text()
    assert_is_alone(page)
    assert f"{found['top1']:.4f}" in page
    surest = max(
        (row for row, hit in zip(rows, right, strict=True) if not hit),
        key=lambda row: float(row["probability"]),
    )
    assert surest["path"].replace("/", "/<wbr>") in page


def assert_is_alone(page: str) -> None:
    """A page that asks for no other file, and runs nothing."""
    assert not re.findall(r"<(?:script|link(?! rel=\"icon\" href=\"data:,\")|iframe|object)", page)
    sources = re.findall(r"(?:src|href)=\"([^\"]{0,40})", page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "url(" not in page


def test_without_a_report_the_same_is_found_and_no_library_is_imported_for_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepvit_train.evaluation import prediction

    def refused(*arguments: object) -> None:
        raise AssertionError("nothing is recorded")

    with_report = evaluate.run(compose_command("eval", [f"checkpoint={run}", *FILES]))
    monkeypatch.setattr(prediction.Recorder, "add", refused)
    without = evaluate.run(compose_command("eval", [f"checkpoint={run}", *FILES, "report=false"]))
    assert without | {"images_per_s": 0} == with_report | {"images_per_s": 0}


def test_a_partial_evaluation_of_some_classes_has_a_report(
    call: Command, run: Path, digits: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few" / "val"
    few.mkdir(parents=True)
    for name in ("3", "7"):
        (few / name).symlink_to(digits / "val" / name)
    told = call(
        "eval",
        str(run),
        *FILES,
        f"data.root={tmp_path / 'few'}",
        "data.allow_subset=true",
        "data.follow_links=true",
        "batch_size=10",
        "limit_batches=2",
    )
    assert told.returncode == 0, told.stderr
    (line,) = [line for line in told.stdout.splitlines() if line.startswith("read: ")]
    folder = Path(line.removeprefix("read: ")).parent
    content = json.loads((folder / "evaluation.json").read_text())
    assert (content["images"], content["of"], sorted(content["classes"])) == (20, 73, ["3", "7"])
    page = (folder / "report.html").read_text()
    assert "Partial: 20 images of 73" in page
    assert "Outputs restricted to the 2 classes present, of 10" in page


def test_two_ranks_write_the_report_of_one(run: Path, tmp_path: Path) -> None:
    typed = [f"checkpoint={run}", *FILES, "batch_size=50"]
    evaluate.run(compose_command("eval", typed))
    folder, _ = report_of(run)
    alone = (folder / "predictions.csv").read_text()
    (folder / "predictions.csv").unlink()
    assert as_ranks(2, lambda: evaluate.run(compose_command("eval", typed))) == 0
    assert (folder / "predictions.csv").read_text() == alone


def test_a_weights_file_of_no_run_has_its_report_beside_it(call: Command, run: Path, tmp_path: Path) -> None:
    import shutil

    (best,) = (run / "checkpoints" / "best").resolve().glob("model.safetensors")
    shutil.copy(best, tmp_path / "alone.safetensors")
    told = call(
        "eval", "checkpoint=alone.safetensors", *FILES, "data=digits", "limit_batches=1", "batch_size=40"
    )
    assert told.returncode == 0, told.stderr
    (page,) = tmp_path.glob("alone.safetensors.live.val*/report.html")
    assert f"read: {page.parent.name}/report.html" in told.stdout


def test_a_link_in_the_place_of_the_report_is_refused(call: Command, run: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    shutil.rmtree(copy / "evaluation", ignore_errors=True)
    (copy / "evaluation").symlink_to(tmp_path)
    told = call("eval", "copy", *FILES)
    assert told.returncode == 6
    assert "copy/evaluation: is a link" in told.stderr
    assert list((copy / "checkpoints").glob("step_*.json"))


def perfect(images: int, classes: int, wrong: int = 0) -> Predictions:
    targets = np.arange(images) % classes
    answers = targets.copy()
    answers[:wrong] = (answers[:wrong] + 1) % classes
    return predictions_of(4 * np.eye(classes, dtype=np.float32)[answers], targets)


def test_a_perfect_result_is_no_proof(tmp_path: Path) -> None:
    text = build_report(perfect(60, 5), 5, tmp_path).write().read_text()
    assert text.count("1.0000 (no interval: no mistake in 60 images)") == 2
    assert "No mistake in 60 images. Near copies of training images" in text
    assert "data.group_by" in text
    assert "None: every image was recognised." in text
    assert "Which mistakes is the model surest of?" not in text
    assert "Which images have the largest loss?" in text
    assert "Top-5" not in text  # of five classes every answer is among five
    assert "temperature" not in text


def test_a_result_with_mistakes_has_its_intervals(tmp_path: Path) -> None:
    text = build_report(perfect(120, 6, wrong=9), 6, tmp_path).write().read_text()
    assert "no interval" not in text
    assert "Near copies" not in text
    assert "Which mistakes is the model surest of?" in text
    assert "Top-5 accuracy is 0.9250" in text
    # A line breaks after the folder, and not inside of the file's name.
    assert re.search(r"class 0000 of \$x_0\$/<wbr>\d{6}\.jpg<br>", text)


def test_a_small_evaluation_says_so(tmp_path: Path) -> None:
    text = build_report(perfect(40, 6, wrong=9), 6, tmp_path).write().read_text()
    assert "These are only 40 images. Near copies of training images" in text


@pytest.mark.slow
def test_a_thousand_classes_stay_readable_and_small(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = build_report(draw_predictions(10_000, 1000, strength=4.0), 1000, tmp_path, side=224).write()
    text = page.read_text()
    assert page.stat().st_size < 10e6
    assert_is_alone(text)
    assert text.count("<tr>") > 1000
    assert "All 1000 classes" in text
    assert (page.parent / "confusion_overview.png").is_file()
