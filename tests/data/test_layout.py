"""Folders that are probably not what was meant are said: one class alone, one folder level too many."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from deepvit_train.data.index import scan_split, scan_tars
from deepvit_train.data.layout import layout_warnings


def write(root: Path, *paths: str) -> None:
    for path in paths:
        file = root / "train" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(file)


def warned(root: Path) -> str:
    return "\n".join(layout_warnings(scan_split(root, "train", False)))


def test_one_class_alone(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "cat/2.png")
    (line,) = layout_warnings(scan_split(tmp_path, "train", False))
    assert f"{tmp_path}/train: holds one class alone, cat" in line
    assert "loss 0, accuracy 1" in line
    assert "folder level" not in line


def test_one_level_too_many_names_the_folders_seen(tmp_path: Path) -> None:
    write(tmp_path, "images/cat/1.png", "images/dog/1.png", "images/dog/2.png")
    said = warned(tmp_path)
    assert "one class alone, images" in said
    assert "images/ holds cat/, dog/" in said
    assert f"they belong into {tmp_path}/train" in said


def test_folders_of_classes_in_several_folders(tmp_path: Path) -> None:
    write(tmp_path, *(f"{outer}/{inner}/1.png" for outer in ("train", "val") for inner in "abcdefgh"))
    said = warned(tmp_path)
    assert "none of the 2 class folders holds an image itself" in said
    assert "train/ holds a/, b/, c/, d/, e/, ... 3 more; val/ holds a/" in said


def test_classes_may_have_other_numbers_than_their_order(tmp_path: Path) -> None:
    write(tmp_path, "a/1.png", "b/x/1.png", "b/y/1.png")
    index = scan_split(tmp_path, "train", False)
    swapped = replace(index, classes=["b", "a"], targets=1 - index.targets)
    assert layout_warnings(swapped) == []
    (tmp_path / "train" / "a" / "1.png").unlink()
    write(tmp_path, "a/v/1.png", "a/w/1.png")
    index = scan_split(tmp_path, "train", False)
    (line,) = layout_warnings(replace(index, classes=["b", "a"], targets=1 - index.targets))
    assert "b/ holds x/, y/; a/ holds v/, w/" in line


@pytest.mark.parametrize(
    "paths",
    [
        ("cat/1.png", "dog/1.png"),
        ("cat/images/1.png", "dog/images/1.png"),  # as in Tiny ImageNet
        ("cat/young/1.png", "cat/old/1.png", "dog/1.png"),  # some class has images of its own
        ("cat/1.png", "cat/more/2.png", "cat/other/3.png", "dog/a/1.png", "dog/b/1.png"),
    ],
)
def test_usual_layouts_are_no_reason_for_a_warning(tmp_path: Path, paths: tuple[str, ...]) -> None:
    write(tmp_path, *paths)
    assert warned(tmp_path) == ""


def test_tar_files_are_looked_at_as_their_folders(tmp_path: Path) -> None:
    write(tmp_path, "a/x/1.png", "a/y/1.png", "b/x/1.png", "b/y/1.png")
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(tmp_path / "train", ".")
    (line,) = layout_warnings(scan_tars(tmp_path, "train"))
    assert "a/ holds x/, y/; b/ holds x/, y/" in line
