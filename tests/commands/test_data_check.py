"""Run `deepvit-data check`: tables, JSON, and the exit code for a data set with errors."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from deepvit_train.commands import data_check
from deepvit_train.config.compose import compose_command
from deepvit_train.error import ConfigError, DataError

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
    assert any(f"data.workers={timing['workers']} keeps up" in line for line in said)
    assert timing["images"] == 24


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
    with pytest.raises(DataError, match=r"data\.root="):
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
