"""Images in tar files: few files for a network file system to find, each image at a known place in one.

An image is read by its offset, so order, draws and resume are those of a folder with the same files.
"""

from __future__ import annotations

import glob
import io
import os
import re
import stat
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from deepvit_train.classes import TORCHVISION, ordered
from deepvit_train.console import one_line
from deepvit_train.data.cache import Listing, Stamp, stamp_of
from deepvit_train.data.decode import OPENING, BadImageError, UnreadableError
from deepvit_train.data.ending import as_names, ending_of, is_image, split_hint, summed_up
from deepvit_train.data.folder import WHOLE, MissingSplitError, refuse_splits
from deepvit_train.error import DataError

LONGEST_HEADER = 2**20  # bytes; real ones have a few hundred
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
            self._close(number)  # a server that was restarted knows nothing of what was open before
            raise UnreadableError(name, error) from None
        if len(data) < size:
            raise BadImageError(name, f"cut short: {len(data)} of {size} bytes")
        return data

    def _descriptor(self, number: int) -> int:
        """An open file, which processes can share: it is never read at its own position."""
        if number not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._close(next(iter(self._open)))
            self._open[number] = os.open(self.files[number], OPENING)
        self._open.move_to_end(number)
        return self._open[number]

    def _close(self, number: int) -> None:
        if number in self._open:
            os.close(self._open.pop(number))


class Member(NamedTuple):
    """An image in a tar file: which file, its path there, and where its bytes are."""

    number: int
    path: str
    label: str | None  # what NAME.cls beside it says
    offset: int
    size: int

    @property
    def folders(self) -> list[str]:
        """The folders it lies in, outermost first."""
        return self.path.split("/")[:-1]


def list_tars(root: Path, split: str) -> Listing:
    """Find the images of a split in root/SPLIT.tar, root/SPLIT/*.tar or root/*SPLIT-*.tar, by class and name.

    Those of `WHOLE` are in root/*.tar.

    The class of an image is its first folder below those that all images share; else what a member NAME.cls
    says, as webdataset writes it; else the name of the tar file. Returns the arrays and names of an index,
    and what tells later changes. Raises DataError.
    """
    files, stamps = _tar_files(root, split)
    left_out: Counter[str] = Counter()
    members = [member for number, file in enumerate(files) for member in _images(number, file, left_out)]
    if not members:
        said = f"; left out: {summed_up(left_out)}" if left_out else ""
        raise DataError(f"{files[0]}: holds no image (docs/data.md lists the endings){said}")
    shared = _shared_folders(members)
    found = [
        (_class_of(member, shared, files), f"{files[member.number].name}/{member.path}", member)
        for member in members
    ]
    classes = ordered({label for label, *_ in found}, TORCHVISION)
    order = {label: number for number, label in enumerate(classes)}
    found.sort(key=lambda image: (order[image[0]], image[1]))
    names = [os.fsencode(name) for _, name, _ in found]
    arrays = {
        "paths": np.frombuffer(b"".join(names), dtype=np.uint8),
        "ends": np.array([len(name) for name in names], dtype=np.int64).cumsum(),
        "targets": np.array([order[label] for label, *_ in found], dtype=np.int32),
        "places": np.array([(one.number, one.offset, one.size) for *_, one in found], dtype=np.int64),
    }
    names_kept = {
        "classes": classes,
        "tars": [str(file) for file in files],
        "left_out": as_names(left_out),
    }
    return arrays, names_kept, stamps


def _tar_files(root: Path, split: str) -> tuple[list[Path], list[Stamp]]:
    name = glob.escape(split)
    try:
        stamps = [stamp_of(str(folder)) for folder in (root, root / split) if folder.is_dir()]
        files = [root / f"{split}.tar"] if (root / f"{split}.tar").is_file() else []
        files = files or sorted((root / split).glob("*.tar")) or sorted(root.glob(f"*{name}-*.tar"))
        if split == WHOLE and len(parts := _splits_in(root)) > 1:
            refuse_splits(root, parts)
        stamps += [stamp_of(str(file)) for file in files]
    except OSError as error:
        raise DataError(f"{root}: can't be listed ({error.strerror})") from None
    if not files:
        if split == WHOLE:
            raise DataError(f"{root}: holds no tar files: {root}/*.tar")
        raise MissingSplitError(
            f"{root}: holds no tar files of {split}: {split}.tar, {split}/*.tar or *{split}-*.tar"
            f"{split_hint(split, _splits_in(root))}"
        )
    return files, stamps


def _splits_in(root: Path) -> list[str]:
    """The splits that the tar files in a folder, and in its folders, belong to by their names."""
    folders = {file.parent.name for file in root.glob("*/*.tar")}
    shards = {
        match[1] for file in root.glob("*.tar") if (match := re.match(r"(?:.*-)?([^-]+)-[^-]*$", file.stem))
    }
    return sorted(folders | shards | {file.stem for file in root.glob("*.tar")})


def _images(number: int, file: Path, left_out: Counter[str]) -> Iterator[Member]:
    """The images in a tar file; of two members of one name the later, which would overwrite the other.

    What is no image is counted in `left_out`, by ending.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with _open_headers(file) as headers, tarfile.open(fileobj=headers, mode="r:") as opened:
            for member in _forwards(opened):
                path = str(PurePosixPath(member.name))
                if member.isdir() or path.startswith(".") or "/." in path:
                    continue
                if not member.isreg():
                    left_out["links"] += 1
                elif is_image(path):
                    if member.issparse():
                        raise DataError(f"{file}: {one_line(path)} is stored as a sparse file")
                    images[path] = member.offset_data, member.size
                elif path.endswith(".cls") and (content := opened.extractfile(member)):
                    labels[path.removesuffix(".cls")] = content.read(100).decode().strip()
                else:
                    left_out[ending_of(path.rpartition("/")[2])] += 1
            headers.check_end(opened.offset)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        # Python's tarfile raises nearly every kind of exception on broken headers.
        reason = one_line(str(error)) or type(error).__name__
        raise DataError(f"{file}: can't be read as an uncompressed tar file ({reason})") from None
    for path, (offset, size) in images.items():
        yield Member(number, path, labels.get(path.rpartition(".")[0]), offset, size)


def _forwards(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file. Raises TarError for one that leads back or has a size below zero."""
    place = -1
    for member in archive:
        if member.size < 0 or member.offset <= place:
            raise tarfile.ReadError(f"{member.name} has a size of {member.size} bytes")
        place = member.offset
        yield member


def _open_headers(file: Path) -> _Headers:
    headers = _Headers(os.open(file, OPENING))
    if not stat.S_ISREG(os.fstat(headers.fileno()).st_mode):
        headers.close()
        raise tarfile.ReadError("not a regular file")
    return headers


class _Headers(io.FileIO):
    """A tar file of which only headers are read, none of them long. Raises TarError for others."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)

    def check_end(self, place: int) -> None:
        """Raise TarError for a place that has neither a header nor zeros: Python says nothing of it."""
        self.seek(place)
        if self.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no header at byte {place}")


def _shared_folders(members: list[Member]) -> int:
    """How many leading folders all images share and no class is named by."""
    # What the first and the last in order share, all between them share.
    first, last = (extreme(member.folders for member in members) for extreme in (min, max))
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    if any(len(member.folders) == shared and member.label is None for member in members):
        return max(0, shared - 1)
    return shared


def _class_of(member: Member, shared: int, files: list[Path]) -> str:
    file = files[member.number]
    label = next(iter(member.folders[shared:]), member.label or file.stem)
    if one_line(label) != label:
        raise DataError(f"{file}: the class {one_line(label)!r} has a name that can't be shown")
    return label
