"""Find images that nobody has labelled, and read them so that each is known by its number in the list."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from deepvit_train.data.dataset import ImageDataset
from deepvit_train.data.ending import summed_up
from deepvit_train.data.folder import Walk
from deepvit_train.data.index import ImageIndex, index_images, scan_tars
from deepvit_train.data.order import Key
from deepvit_train.data.transform import Erasure
from deepvit_train.error import DataError, nearest

BAD = -1  # the number of an image that can't be read


@dataclass(frozen=True)
class ListedImages(ImageIndex):
    """Images by the names that they were given by: absolute paths, or paths from the working folder."""

    def path(self, image: int) -> str:
        start = self.ends[image - 1] if image else 0
        return os.fsdecode(self.paths[start : self.ends[image]].tobytes())


class UnlabelledDataset(ImageDataset):
    """Batches whose targets are the images' numbers in the index. A bad image is black, its target BAD."""

    def _sample(self, key: Key, bad: list[str]) -> tuple[np.ndarray, int, Erasure]:
        bad_before = len(bad)
        pixels, _, erasure = super()._sample(key, bad)
        return pixels, key.image if len(bad) == bad_before else BAD, erasure


def find_images(images: str, listed: IO[bytes], follow_links: bool) -> ImageIndex:
    """Index an image, the images of a folder at any depth, those of a tar file, or those of a list.

    The order is that of the list, or by folder and name.

    Args:
        images: path of a file or a folder, or '-' for the list.
        listed: the list: a path a line, or, as `find -print0` writes them, paths that end with a NUL.
        follow_links: whether links may lead out of a folder.

    Raises DataError if there are none.
    """
    if images == "-":
        return _of_list(_paths_in(listed.read()))
    try:
        given = Path(images).expanduser()
        is_folder, is_there = given.is_dir(), given.exists()
        siblings = [] if is_there or not given.parent.is_dir() else _names(given.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"images={images}: can't be read ({reason})") from None
    if not is_there:
        raise DataError(f"images={images}: no such file or folder{nearest(given.name, siblings)}")
    if is_folder:
        return _of_folder(given, follow_links)
    return scan_tars(given.parent, given.stem) if given.suffix == ".tar" else _of_list([str(given)])


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def _paths_in(listed: bytes) -> list[str]:
    paths = listed.split(b"\0") if b"\0" in listed else listed.splitlines()
    return [os.fsdecode(path) for path in paths if path]


def _of_list(paths: list[str]) -> ImageIndex:
    if not paths:
        raise DataError("images=-: the list on stdin is empty (an image's path a line)")
    index = index_images(Path(), {"": paths})
    return ListedImages(index.folder, index.classes, index.paths, index.ends, index.targets)


def _of_folder(folder: Path, follow_links: bool) -> ImageIndex:
    walk = Walk(folder.absolute(), ".", follow_links)
    paths = walk.every_image()
    if not paths:
        left_out = f"; left out: {summed_up(walk.left_out)}" if walk.left_out else ""
        raise DataError(f"images={folder}: holds no image (docs/data.md lists the endings){left_out}")
    return replace(index_images(folder, {"": paths}), left_out=dict(walk.left_out))
