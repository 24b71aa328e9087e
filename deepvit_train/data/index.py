"""The index of a folder of images: which files there are, and the class of each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from deepvit_train.data.digits import digits_root
from deepvit_train.error import DataError
from deepvit_train.schema.data import DataConfig, DataName


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split, sorted by class and path.

    `paths` is an array of bytes, relative to `folder`: loader processes share it instead of copying it, as
    they would copy a list of str by counting references.
    """

    folder: Path
    classes: list[str]
    paths: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The file of an image."""
        return self.folder / os.fsdecode(bytes(self.paths[index]))


def data_root(data: DataConfig) -> Path:
    """The folder that holds the splits. Raises DataError where it is missing."""
    if data.root is None and data.name == DataName.digits:
        return digits_root()
    folder = Path(data.root or "").expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={data.root}: no such folder")
    return folder


def scan_split(root: Path, split: str) -> ImageIndex:
    """Index root/split/CLASS/**/*.{jpg,png,...}. Raises DataError naming what is missing or empty."""
    folder = root / split
    if not folder.is_dir():
        present = sorted(entry.name for entry in root.iterdir() if entry.is_dir())[:5]
        raise DataError(f"{folder}: no such folder; {root} holds {', '.join(present) or 'no folders'}")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"{folder}: holds no class folders (expected {folder}/CLASS/IMAGE.jpg)")
    files = [_files(folder, name) for name in classes]
    if empty := [name for name, found in zip(classes, files, strict=True) if not found]:
        raise DataError(
            f"{folder}: no image in class {', '.join(empty[:5])} (looked for {', '.join(IMG_EXTENSIONS)})"
        )
    return ImageIndex(
        folder=folder,
        classes=classes,
        paths=np.array([os.fsencode(path) for found in files for path in found]),
        targets=np.repeat(np.arange(len(classes)), [len(found) for found in files]),
    )


def check_classes(index: ImageIndex, expected: list[str]) -> None:
    """Raise DataError where a split's class folders are not those the model knows, naming them."""
    missing = sorted(set(expected) - set(index.classes))
    unknown = sorted(set(index.classes) - set(expected))
    if missing or unknown:
        parts = [f"unknown to the model: {', '.join(unknown[:5])}"] if unknown else []
        parts += [f"missing: {', '.join(missing[:5])}"] if missing else []
        raise DataError(f"{index.folder}: other classes than the model's ({'; '.join(parts)})")


def _files(folder: Path, class_name: str) -> list[str]:
    found = []
    for where, folders, names in os.walk(folder / class_name, followlinks=True):
        folders.sort()
        inside = os.path.relpath(where, folder)
        found += [f"{inside}/{name}" for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
    return found
