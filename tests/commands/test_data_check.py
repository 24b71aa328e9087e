"""Run `deepvit-data check`: tables, JSON, and the exit code for a data set with errors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.commands import data_check, evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.error import ConfigError, DataError
from tests.conftest import QUICK

SMALL = ["model=digits", "threads=1", "data.workers=0"]


def run(root: Path, *overrides: str) -> dict[str, object]:
    return data_check.run(compose_command("data-check", [f"root={root}", *SMALL, *overrides]))


def test_a_good_data_set_is_timed(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run(image_folder)
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1]) == report
    assert "errors: 0, warnings: 0" in said[-2]
    timing = report["timing"]
    assert list(timing["ms_an_image"]) == ["read", "decode", "augment", "copy", "compute"]
    assert all(taken > 0 for taken in timing["ms_an_image"].values())
    parts = timing["ms_an_image"]
    loading, device = parts["read"] + parts["decode"] + parts["augment"], parts["copy"] + parts["compute"]
    assert timing["workers"] - 1.01 < 1.25 * loading / device <= timing["workers"] + 0.01
    assert any(
        f"(data.workers={timing['workers']}) can read images as fast as the CPU" in line for line in said
    )
    assert timing["images"] == timing["images_an_epoch"] == 24
    # Without loader processes reading and computing take turns. An epoch shows every image once.
    assert timing["epochs"] == 60
    assert timing["hours"] == pytest.approx(60 * 24 * (loading + device) / 3.6e6, abs=1e-3)
    told = next(line for line in said if line.startswith("at this speed deepvit-train takes about "))
    assert told.endswith("for its usual 60 epochs of 24 images, without evaluations")


def test_files_that_are_no_images_are_counted_once(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_folder / "val", image_folder / "train", dirs_exist_ok=True)
    shutil.rmtree(image_folder / "val")
    (image_folder / "train" / "ant" / "notes.txt").touch()
    (image_folder / "train" / "bee" / "Thumbs.db").touch()
    report = run(image_folder / "train", "data.val_share=0.2", "timing=false")
    row = next(line for line in capsys.readouterr().out.splitlines() if "left out" in line)
    assert row.count(".db") == row.count(".txt") == 1
    assert [split["left_out"] for split in report["splits"].values()] == [{".db": 1, ".txt": 1}, {}]


def test_errors_are_told_and_end_with_a_data_error(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = image_folder / "val" / "bee" / "1.png"
    broken.write_bytes(b"")
    with pytest.raises(DataError, match=rf"errors in .*: 1; the first: {broken}: an empty file") as error:
        run(image_folder, "timing=false")
    assert error.value.exit_code == 4
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1])["errors"] == [f"{broken}: an empty file"]
    assert json.loads(said[-1])["timing"] is None
    assert f"error: {broken}: an empty file" in said


def test_a_data_set_without_a_readable_image_is_told(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in image_folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="33; the first"):
        run(image_folder)
    assert "... 13 more errors" in capsys.readouterr().out


def test_a_pipe_is_not_waited_for(image_folder: Path) -> None:
    os.mkfifo(image_folder / "train" / "ant" / "pipe.png")
    with pytest.raises(DataError, match=r"1; the first: .*pipe\.png: not a regular file"):
        run(image_folder)


@pytest.mark.parametrize("root", ["~nosuchuser/x", "/" + "long" * 1000])
def test_a_root_that_can_not_be_looked_at_is_named(root: str) -> None:
    with pytest.raises(DataError, match=r"^root="):
        data_check.run(compose_command("data-check", [f"root='{root}'", *SMALL]))


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "nowhere")


def test_train_alone_is_not_compared_with_itself(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "val")
    report = run(image_folder, "data.split=train", "timing=false")
    assert list(report["splits"]) == ["train"]


def test_a_second_root_is_refused(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data\.root={tmp_path}: another folder"):
        run(image_folder, f"data.root={tmp_path}")


def test_tar_files_are_checked_as_their_folder(image_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(image_folder / split, ".")
    packed, folder = run(tmp_path, "data=tar"), run(image_folder)
    assert packed["splits"] == folder["splits"]
    assert packed["timing"]["images"] == folder["timing"]["images"]

    (image_folder / "train" / "bee" / "4.png").write_bytes(b"")
    shutil.copy(image_folder / "val" / "ant" / "0.png", image_folder / "train" / "ant" / "twin.png")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(image_folder / "train", ".")
    with pytest.raises(DataError, match=rf"2; the first: {tmp_path}/train\.tar/bee/4\.png: an empty file"):
        run(tmp_path, "data=tar", "timing=false")


def test_more_bad_images_than_training_replaces_are_told(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1", "2"):
        (image_folder / "train" / "bee" / f"{name}.png").write_bytes(b"")
    for allowed, told in ((1, True), (2, False)):
        with pytest.raises(DataError):
            run(image_folder, "timing=false", f"data.max_bad={allowed}")
        said = capsys.readouterr().out
        assert ("training would stop: more bad images than data.max_bad=1" in said) == told
        assert json.loads(said.splitlines()[-1])["splits"]["train"]["bad"] == 2


DEEP = {
    "12 bits in 16": (np.uint16, 4095, "[0,4095]", "TIFF I;16 0..4095"),
    "few bits in 32": (np.int32, 200, "[0,255]", "TIFF I 0..200"),
    "floats": (np.float32, 812.5, "[0,812.5]", "TIFF F 0..812.5"),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_range_of_deep_values_is_found_and_makes_the_data_set_good(
    image_folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the whole data set: one image holds the largest value, all others half of it."""
    kind, top, span, told = DEEP[name]
    for number, file in enumerate(sorted(image_folder.rglob("*.png"))):
        values = np.full((8, 8), top if number == 5 else top / 2)
        values[0, 0] = 0
        values[number % 7, 3] = number / 100  # no two images are alike
        file.unlink()
        Image.fromarray(values.astype(kind)).save(file.with_suffix(".tiff"))
    with contextlib.suppress(DataError):  # floats beyond 0..1 are bad without the key
        run(image_folder, "timing=false")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert any(f"{told}; data.value_range={span} fits" in line for line in report["warnings"])
    assert all("set data.value_range" in line for line in report["errors"] if "the same content" not in line)
    with contextlib.suppress(DataError):
        run(image_folder, "timing=false", f"data.value_range={span}")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["warnings"] == []
    assert not any("value_range" in line for line in report["errors"])


def test_the_range_of_a_run_is_that_of_its_evaluation(image_folder: Path, tmp_path: Path) -> None:
    """Bright values alone would be darker under the usual range, and the loss another."""
    rng = np.random.default_rng(0)
    for file in image_folder.rglob("*.png"):
        Image.fromarray(rng.integers(0, 4096, (16, 16), dtype=np.uint16)).save(file)
    data = ["data=imagefolder", f"data.root={image_folder}", "augment=none", "trainer.batch_size=8"]
    run_dir = tmp_path / "run"
    options = [*data, "data.value_range=[0,4095]", "trainer.epochs=1", "schedule.warmup_epochs=0"]
    trained = train.run(compose_command("train", [*QUICK, *options, f"run_dir={run_dir}"]))
    where = [f"checkpoint={run_dir}", f"data.root={image_folder}", "threads=1", "data=imagefolder"]
    losses = [
        evaluate.run(compose_command("eval", [*where, *more]))["loss"]
        for more in ([], ["data.value_range=[0,4095]"], ["data.value_range=[0,65535]"])
    ]
    assert losses[0] == losses[1] == pytest.approx(trained["val/loss"])
    assert losses[2] != losses[0]
