"""Predict as a user does: rows agree with the evaluation and with the model, and bad files end nothing."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.evaluation.loaded import load
from deepvit_train.run.found import find
from tests.conftest import QUICK, Command

COMMON = ["threads=1", "data.workers=0"]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, long enough for the model to tell images apart."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    longer = ["trainer.epochs=3", "trainer.limit_batches=44", "optim.lr=0.003", "trainer.log_every_steps=44"]
    train.run(compose_command("train", [*QUICK, f"run_dir={folder}", *longer]))
    return folder


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_accuracy_of_the_rows_is_that_of_the_evaluation(
    call: Command, trained: Path, tmp_path: Path
) -> None:
    evaluated = json.loads(call("eval", str(trained), *COMMON).stdout.splitlines()[-1])
    predicted = call("predict", str(trained), "out=rows.csv", *COMMON)
    assert predicted.returncode == 0, predicted.stderr
    report = json.loads(predicted.stdout)
    assert (report["rows"], report["bad"], report["images"]) == (364, 0, 364)
    rows = rows_of((tmp_path / "rows.csv").read_text())
    told = [[row[f"class_{place}"] for place in range(1, 6)] for row in rows]
    truth = [Path(row["file"]).parent.name for row in rows]
    both = list(zip(told, truth, strict=True))
    assert sum(names[0] == label for names, label in both) / 364 == evaluated["top1"]
    assert sum(label in names for names, label in both) / 364 == evaluated["top5"]
    # The model must tell images apart, or any order of rows would do.
    assert len({row["class_1"] for row in rows}) > 2


def test_a_folder_a_tar_file_a_list_and_single_images_give_the_same_rows(
    call: Command, trained: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = sorted((digits / "val" / "3").iterdir())[:3]
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    for image in images:
        shutil.copy(image, folder)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, "photos")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(str, images)).encode())))
    forms = ["photos", "photos.tar", "-"]
    results = [call("predict", str(trained), f"images={form}", "top=3", *COMMON) for form in forms]
    single = [call("predict", str(trained), f"images={image}", "top=3", *COMMON) for image in images]
    for result in [*results, *single]:
        assert result.returncode == 0, result.stderr
    tables = [rows_of(result.stdout) for result in results]
    tables.append([row for result in single for row in rows_of(result.stdout)])
    columns = [f"{what}_{place}" for place in (1, 2, 3) for what in ("class", "probability")]
    for table in tables:
        assert [Path(row["file"]).name for row in table] == [image.name for image in images]
        assert list(table[0]) == ["file", *columns]
    for row in zip(*tables, strict=True):
        for name in columns:
            values = [each[name] for each in row]
            if name.startswith("class"):
                assert len(set(values)) == 1
            else:  # batches of another size may add in another order
                assert [float(value) for value in values] == pytest.approx([float(values[0])] * 4, rel=1e-4)


def test_a_bad_file_is_named_and_left_out_and_changes_no_other_row(
    call: Command, trained: Path, image_folder: Path
) -> None:
    val = image_folder / "val"
    before = call("predict", str(trained), f"images={val}", *COMMON)
    (val / "bee" / "1a.jpg").write_bytes(b"\xff\xd8\xff broken")
    (val / "bee" / "zz.png").touch()
    after = call("predict", str(trained), f"images={val}", "out=rows.jsonl", *COMMON)
    assert (before.returncode, after.returncode) == (0, 0), after.stderr
    assert f"bad image, left out: {val}/bee/1a.jpg: " in after.stderr
    assert f"bad image, left out: {val}/bee/zz.png: an empty file" in after.stderr
    assert json.loads(after.stdout)["bad"] == 2
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    expected = rows_of(before.stdout)
    assert [row["file"] for row in rows] == [row["file"] for row in expected]
    assert len(rows) == 9
    for row, same in zip(rows, expected, strict=True):
        assert row["classes"] == [same[f"class_{place}"] for place in range(1, 6)]
        shares = [float(same[f"probability_{place}"]) for place in range(1, 6)]
        assert row["probabilities"] == pytest.approx(shares, rel=1e-4)


def test_features_are_what_the_classifier_reads(call: Command, trained: Path, image_folder: Path) -> None:
    (image_folder / "val" / "ant" / "broken.png").write_bytes(b"nothing")
    options = [f"images={image_folder / 'val'}", "out=rows.jsonl", "features=true", "top=99", "batch_size=4"]
    assert call("predict", str(trained), *options, *COMMON).returncode == 0
    features = torch.from_numpy(np.load("rows.jsonl.npy"))
    assert features.shape == (9, 16)
    head = load(str(trained), "auto").model.head
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    with torch.no_grad():
        shares = head(features).softmax(dim=1)
    for row, own in zip(rows, shares, strict=True):
        by_class = dict(zip(row["classes"], row["probabilities"], strict=True))
        assert [by_class[str(digit)] for digit in range(10)] == pytest.approx(own.tolist(), rel=1e-5)


def test_overlays_have_the_image_under_the_attention(
    call: Command, trained: Path, image_folder: Path
) -> None:
    result = call("predict", str(trained), f"images={image_folder / 'val'}", "attention=seen", *COMMON)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in Path("seen").iterdir())
    assert names == [f"{number:06d}_{number % 3}.png" for number in range(9)]
    first, second = (np.asarray(Image.open(Path("seen") / name)) for name in names[:2])
    assert first.shape == (224, 224, 3)
    assert np.abs(first.astype(int) - second).mean() > 1
    again = call("predict", str(trained), f"images={image_folder / 'val'}", "attention=seen", *COMMON)
    assert again.returncode == 6
    assert "error: attention=seen: holds something already" in again.stderr


def test_a_name_with_a_line_break_is_one_row(call: Command, trained: Path, image_folder: Path) -> None:
    folder = image_folder / "val" / "ant"
    (folder / "0.png").rename(folder / 'a\nb,"c.png')
    result = call("predict", str(trained), f"images={folder}", "top=1", *COMMON)
    assert len(result.stdout.splitlines()) == 4
    assert f'{folder}/a\\nb,"c.png' in [row["file"] for row in rows_of(result.stdout)]


def test_a_file_without_statistics_is_calibrated_as_for_an_evaluation(
    call: Command, trained: Path, digits: Path, tmp_path: Path
) -> None:
    shutil.copy(find(str(trained)).file, tmp_path / "lone.safetensors")
    top1 = json.loads(call("eval", "lone.safetensors", *COMMON).stdout.splitlines()[-1])["top1"]
    result = call("predict", "lone.safetensors", f"images={digits / 'val'}", "top=1", *COMMON)
    assert "calibrating on 64 training images" in result.stderr
    rows = rows_of(result.stdout)
    assert sum(row["class_1"] == Path(row["file"]).parent.name for row in rows) / 364 == top1


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["images=nowhere.jpg"], 4, "images=nowhere.jpg: no such file or folder"),
        (["images=broken.jpg"], 4, "no image can be told the class of: broken.jpg: "),
        (["features=true"], 2, "features=true needs out=FILE"),
        (["format=xml"], 2, "must be csv|jsonl or null"),
        (["out=file/rows.csv"], 6, "can't be written"),
        (["image=x.jpg"], 2, "did you mean 'images'?"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    call: Command, trained: Path, tmp_path: Path, arguments: list[Any], code: int, told: str
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (tmp_path / "file").touch()
    result = call("predict", str(trained), *arguments, *COMMON)
    assert result.returncode == code, result.stderr
    assert told in result.stderr
    assert "Traceback" not in result.stderr
