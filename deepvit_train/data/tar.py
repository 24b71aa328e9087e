"""Images in tar files: few files for a network file system to find, each image at a known place in one.

An image is read by its offset, so order, draws and resume are those of a folder with the same files.
"""

from __future__ import annotations

import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from deepvit_train.data.cache import Listing, stamp_of
from deepvit_train.data.decode import BadImageError, printable
from deepvit_train.error import DataError

OPEN_FILES = 64  # kept open by a process; a system allows about a thousand


@dataclass(frozen=True)
class TarFiles:
    """The tar files of a split; `places` (N, 3) holds each image's file, offset and size."""

    files: list[str]
    places: np.ndarray
    _open: OrderedDict[int, int] = field(default_factory=OrderedDict)

    def read(self, image: int, name: str, max_bytes: int) -> bytes:
        """The content of an image. Raises BadImageError."""
        number, offset, size = self.places[image].tolist()
        if not size:
            raise BadImageError(name, "an empty file")
        if size > max_bytes:
            raise BadImageError(name, f"{size} bytes, more than data.max_bytes={max_bytes}")
        try:
            data = os.pread(self._descriptor(number), size, offset)
        except OSError as error:
            raise BadImageError(name, error.strerror or error) from None
        if len(data) < size:
            raise BadImageError(name, f"cut short: {len(data)} of {size} bytes")
        return data

    def _descriptor(self, number: int) -> int:
        """An open file, which processes can share: it is never read at its own position."""
        if number not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[number] = os.open(self.files[number], os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(number)
        return self._open[number]


def list_tars(root: Path, split: str) -> Listing:
    """Find the images of a split in root/SPLIT.tar, root/SPLIT/*.tar or root/*SPLIT-*.tar, by class and name.

    The class of an image is the folder it lies in; else what a member NAME.cls says, as webdataset writes it;
    else the name of the tar file. Returns the arrays and names of an index, and what tells later changes.
    Raises DataError.
    """
    stamps = [stamp_of(str(folder)) for folder in (root, root / split) if folder.is_dir()]
    files = [root / f"{split}.tar"] if (root / f"{split}.tar").is_file() else []
    files = files or sorted((root / split).glob("*.tar")) or sorted(root.glob(f"*{split}-*.tar"))
    if not files:
        raise DataError(
            f"{root}: holds no tar files of {split}: {split}.tar, {split}/*.tar or *{split}-*.tar"
        )
    stamps += [stamp_of(str(file)) for file in files]
    found = [
        (label, f"{file.name}/{name}", number, offset, size)
        for number, file in enumerate(files)
        for label, name, offset, size in _images(file)
    ]
    if not found:
        raise DataError(f"{files[0]}: holds no image (looked for {', '.join(IMG_EXTENSIONS)})")
    classes = sorted({label for label, *_ in found}, key=_numbers_by_value)
    order = {label: number for number, label in enumerate(classes)}
    found.sort(key=lambda image: (order[image[0]], image[1]))
    names = [os.fsencode(name) for _, name, *_ in found]
    arrays = {
        "paths": np.frombuffer(b"".join(names), dtype=np.uint8),
        "ends": np.array([len(name) for name in names], dtype=np.int64).cumsum(),
        "targets": np.array([order[label] for label, *_ in found], dtype=np.int32),
        "places": np.array([place for _, _, *place in found], dtype=np.int64),
    }
    return arrays, {"classes": classes, "tars": [str(file) for file in files]}, stamps


def _images(file: Path) -> Iterator[tuple[str, str, int, int]]:
    """Class, name, offset and size of each image in a tar file."""
    images: list[tarfile.TarInfo] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as opened:
            for member in opened:
                path = PurePosixPath(member.name)
                if not member.isreg() or path.name.startswith("."):
                    continue
                if member.name.lower().endswith(IMG_EXTENSIONS):
                    images.append(member)
                elif path.suffix == ".cls" and (content := opened.extractfile(member)):
                    labels[str(path.with_suffix(""))] = content.read(100).decode().strip()
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read as an uncompressed tar file ({error})") from None
    for member in images:
        path = PurePosixPath(member.name)
        label = path.parent.name or labels.get(str(path.with_suffix("")), file.stem)
        if printable(label) != label:
            raise DataError(f"{file}: the class {printable(label)!r} has a name that can't be shown")
        yield label, member.name.removeprefix("./"), member.offset_data, member.size


def _numbers_by_value(label: str) -> tuple[int, str]:
    return (int(label) if label.isdecimal() else 0, label)
