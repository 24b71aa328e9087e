"""The index of a data set: which images there are, the class of each, and where it is read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from deepvit_train.config.data import DataConfig, DataName
from deepvit_train.data import cache
from deepvit_train.data.cache import Arrays, Listing, Names
from deepvit_train.data.decode import read_file
from deepvit_train.data.digits import digits_root
from deepvit_train.data.folder import Walk
from deepvit_train.data.tar import TarFiles, list_tars
from deepvit_train.error import DataError, spelled


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split, sorted by class and path.

    All paths, relative to `folder`, are one array of bytes, and `ends` says where each ends: loader processes
    share such arrays instead of copying them, as they would copy a list of str by counting references.
    """

    folder: Path
    classes: list[str]
    paths: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    tars: TarFiles | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, image: int) -> str:
        """The file of an image; in a tar file its path behind that of the tar file."""
        start = self.ends[image - 1] if image else 0
        return f"{self.folder}/{os.fsdecode(self.paths[start : self.ends[image]].tobytes())}"

    def file(self, image: int) -> str:
        """The file on disk that holds an image: itself, or a tar file."""
        return self.path(image) if self.tars is None else self.tars.files[self.tars.places[image, 0]]

    def read(self, image: int, max_bytes: int) -> bytes:
        """The content of an image. Raises BadImageError."""
        if self.tars is None:
            return read_file(self.path(image), max_bytes)
        return self.tars.read(image, self.path(image), max_bytes)


def data_root(data: DataConfig) -> Path:
    """The folder that holds the splits. Raises DataError where it is missing."""
    if data.root is None and data.name == DataName.digits:
        return digits_root()
    try:
        folder = Path(data.root or "").expanduser()
        present = folder.is_dir()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.root={data.root}: can't be read ({reason})") from None
    if not present:
        raise DataError(f"data.root={data.root}: no such folder")
    return folder


def open_split(data: DataConfig, split: str) -> ImageIndex:
    """The index of a split of a data set. Raises DataError."""
    if data.name == DataName.tar:
        return scan_tars(data_root(data), split)
    return scan_split(data_root(data), split, data.follow_links)


def scan_split(root: Path, split: str, follow_links: bool) -> ImageIndex:
    """Index root/split/CLASS/**/*.{jpg,png,...}. Raises DataError naming what is missing or empty."""
    walk = Walk(root.absolute(), split, follow_links)
    kept, names = _kept(("folder", root.absolute(), split, follow_links), partial(_list, walk))
    return ImageIndex(root / split, names["classes"], kept["paths"], kept["ends"], kept["targets"])


def scan_tars(root: Path, split: str) -> ImageIndex:
    """Index the tar files of a split. Raises DataError."""
    kept, names = _kept(("tar", root.absolute(), split), partial(list_tars, root.absolute(), split))
    tars, folder = TarFiles(names["tars"], kept["places"]), Path(names["tars"][0]).parent
    return ImageIndex(folder, names["classes"], kept["paths"], kept["ends"], kept["targets"], tars)


def _kept(key: tuple[object, ...], make: Callable[[], Listing]) -> tuple[Arrays, Names]:
    """What the cache keeps under a key, or what is made now."""
    file = cache.cache_file(*key)
    kept = cache.read(file)
    if kept is None:
        started = time.time()
        arrays, names, stamps = make()
        cache.write(file, arrays, names, stamps, started)
        kept = arrays, names
    return kept


def _list(walk: Walk) -> Listing:
    classes = walk.classes()
    arrays = _arrays(walk.images(name) for name in classes)
    counts = np.bincount(arrays["targets"], minlength=len(classes))
    if empty := [name for name, images in zip(classes, counts, strict=True) if not images]:
        raise DataError(
            f"{walk.root / walk.split}: no image in class {', '.join(empty[:5])} "
            f"(looked for {', '.join(IMG_EXTENSIONS)})"
        )
    return arrays, {"classes": classes}, walk.stamps


def index_images(folder: Path, images: dict[str, list[str]]) -> ImageIndex:
    """The index of images given by class, their paths relative to the folder."""
    arrays = _arrays(images.values())
    return ImageIndex(folder, list(images), arrays["paths"], arrays["ends"], arrays["targets"])


def _arrays(images_by_class: Iterable[list[str]]) -> Arrays:
    """Paths, ends and targets of an index; the lists are taken one at a time and not kept."""
    blocks: list[bytes] = []
    lengths: list[np.ndarray] = []
    for images in images_by_class:
        paths = [os.fsencode(path) for path in images]
        blocks.append(b"".join(paths))
        lengths.append(np.array([len(path) for path in paths], dtype=np.int64))
    return {
        "paths": np.frombuffer(b"".join(blocks), dtype=np.uint8),
        "ends": np.concatenate([np.empty(0, np.int64), *lengths]).cumsum(),
        "targets": np.repeat(np.arange(len(lengths), dtype=np.int32), [len(found) for found in lengths]),
    }


def check_classes(index: ImageIndex, expected: list[str]) -> None:
    """Raise DataError if a split's classes are not those the model knows, in the model's order.

    A class is a number to the model: classes in another order would make every prediction wrong.
    """
    missing = sorted(set(expected) - set(index.classes))
    unknown = sorted(set(index.classes) - set(expected))
    if missing or unknown:
        parts = [
            f"{what}: {', '.join(spelled(name, others) for name in names[:5])}"
            for what, names, others in (
                ("unknown to the model", unknown, missing),
                ("missing", missing, unknown),
            )
            if names
        ]
        raise DataError(f"{index.folder}: other classes than the model's ({'; '.join(parts)})")
    if index.classes != expected:
        mine, other = next(pair for pair in zip(expected, index.classes, strict=True) if pair[0] != pair[1])
        raise DataError(
            f"{index.folder}: the model's classes in another order ({other}, where the model has {mine})"
        )
