"""`deepvit-data check`: tables and JSON, and the exit code of a data set with errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepvit_train import data_check
from deepvit_train.config import compose_command
from deepvit_train.error import DataError

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


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        run(tmp_path / "nowhere")
