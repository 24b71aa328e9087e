"""Every file of a data set looked at once: what is wrong with it, and what it consists of."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from deepvit_train.config.data import DataConfig, DataName
from deepvit_train.console import one_line
from deepvit_train.data.absence import is_lost
from deepvit_train.data.decode import BadImageError, Limits, parse_picture
from deepvit_train.data.folder import WHOLE, MissingSplitError, Walk
from deepvit_train.data.index import ImageIndex, index_images, part_of, renamed, scan_tars
from deepvit_train.data.layout import layout_warnings
from deepvit_train.data.split import find_groups, split_hints
from deepvit_train.error import DataError, spelled

CHUNK = 64  # files handed to a process at a time
TOPS = [2.0**bits - 1 for bits in (8, 10, 12, 14, 16)]  # the largest values of so many bits


class Examined(NamedTuple):
    """What one file is. `bad` says why it can't be read, `damage` what a decoder complained of."""

    bad: str = ""
    damage: str = ""
    digest: int = 0
    size: int = 0
    width: int = 0
    height: int = 0
    kind: str = ""
    extent: tuple[float, ...] = ()  # the least and the largest value, of more than 8 bits


@dataclass
class Split:
    """The images of one split and what was found in them. Errors make the check fail, warnings don't."""

    name: str
    index: ImageIndex
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # of the images that can be read
    measures: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))  # bytes, width, height
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    left_out: dict[str, int] = field(default_factory=dict)  # files that are no images, by ending
    # The least and the largest value of more than 8 bits, by kind.
    extents: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        """The images that can't be read."""
        return len(self.index) - self.kinds.total()


def list_split(root: Path, data: DataConfig, name: str) -> Split:
    """The images of a split, with an error for each folder that is missing, empty or led away."""
    split = Split(name, index_images(root / name, {}))
    folder = name if data.val_share is None else WHOLE
    try:
        if data.name == DataName.tar:
            index = scan_tars(root, folder)
            split.left_out = index.left_out
        else:
            walk = Walk(root, folder, data.follow_links)
            images = {name: _images(walk, name, data.empty_classes, split.errors) for name in walk.classes()}
            index = index_images(root / folder, images)
            split.left_out = dict(walk.left_out)
        split.index = renamed(index if data.val_share is None else part_of(index, data, name), data)
        split.warnings += _without_group(index, data.group_by)
    except MissingSplitError as error:
        split.errors.append(f"{error}{split_hints(root, name)}")
    except DataError as error:
        split.errors.append(str(error))
    split.warnings += layout_warnings(split.index)
    return split


def _without_group(whole: ImageIndex, group_by: str | None) -> list[str]:
    """A warning of the images that data.group_by leaves alone: another expression may be meant."""
    if group_by is None:
        return []
    paths = whole.paths_in_class()
    alone = [path for path, group in zip(paths, find_groups(paths, group_by), strict=True) if group is None]
    if not alone:
        return []
    return [
        f"data.group_by={group_by}: finds a group in all but {len(alone):,} of {len(paths):,} paths, which "
        f"are alone, such as {one_line(alone[0])}"
    ]


def _images(walk: Walk, class_name: str, may_be_empty: bool, errors: list[str]) -> list[str]:
    try:
        found = walk.images(class_name)
    except DataError as error:
        errors.append(str(error))
        return []
    if not found and not may_be_empty:
        errors.append(f"{walk.root / walk.split / class_name}: no image in this class")
    return found


def compare_classes(train: Split, other: Split, subset: bool = False) -> list[str]:
    """An error for each class that one split has and the other has not.

    Args:
        subset: whether `other` may lack classes of train.
    """
    if not (train.index.classes and other.index.classes):
        return []
    return [
        f"class {spelled(name, there.index.classes)}: in {here.name}, not in {there.name}"
        for here, there in ([] if subset else [(train, other)]) + [(other, train)]
        for name in sorted(set(here.index.classes) - set(there.index.classes))
    ]


def examine_split(split: Split, limits: Limits, workers: int, advance: Callable[[int], None]) -> None:
    """Examine every image of a split, in so many processes. Raises DataError if the data set goes away."""
    split.measures = np.zeros((len(split.index), 3), np.int64)
    split.digests = np.zeros(len(split.index), np.uint64)
    for image, found in enumerate(_examined(Examination(split.index, limits), workers)):
        split.measures[image] = found.size, found.width, found.height
        split.digests[image] = found.digest
        if found.extent:
            low, high = split.extents.get(found.kind, found.extent)
            split.extents[found.kind] = min(low, found.extent[0]), max(high, found.extent[1])
        if found.bad:
            if is_lost(str(split.index.folder)):
                raise DataError(f"{split.index.folder}: is gone since its images were listed; {found.bad}")
            split.errors.append(found.bad)
        else:
            split.kinds[found.kind] += 1
        if found.damage and not found.bad:
            name = one_line(split.index.path(image))
            split.warnings.append(f"{name}: readable, but damaged ({found.damage})")
        advance(1)


@dataclass(frozen=True)
class Examination(Dataset[Examined]):
    """What each image of an index is."""

    index: ImageIndex
    limits: Limits

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, image: int) -> Examined:
        """Read and decode one image."""
        path = self.index.path(image)
        try:
            data = self.index.read(image, self.limits.max_bytes)
        except BadImageError as error:
            return Examined(bad=str(error))
        digest, size = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"), len(data)
        try:
            picture = parse_picture(path, data, self.limits)
        except BadImageError as error:
            return Examined(bad=str(error), digest=digest, size=size)
        try:
            picture.pixels()
        except BadImageError as error:
            extent = tuple(picture.extent)
            return Examined(bad=str(error), digest=digest, size=size, kind=picture.kind, extent=extent)
        damage = "; ".join([*picture.damage, *_png_damage(data)])
        extent = tuple(picture.extent)
        return Examined("", damage, digest, size, picture.width, picture.height, picture.kind, extent)


def _png_damage(data: bytes) -> list[str]:
    """The first chunk of a PNG whose checksum is wrong, which Pillow does not look at."""
    place = 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return [f"wrong checksum of {data[place + 4 : place + 8]!r} at byte {place}"]
        if data[place + 4 : place + 8] == b"IEND":
            break
        place = end + 4
    return []


def duplicates(train: Split, other: Split) -> list[str]:
    """An error for each image of the other split whose content is also in train."""
    order = np.argsort(train.digests)
    ranks = np.searchsorted(train.digests, other.digests, sorter=order).clip(max=len(order) - 1)
    found = []
    suspects = np.isin(other.digests, train.digests) & (other.measures[:, 0] > 0)
    for image in np.flatnonzero(suspects).tolist():
        twin, size = int(order[ranks[image]]), int(other.measures[image, 0])
        try:
            same = other.index.read(image, size) == train.index.read(twin, size)
        except BadImageError as error:  # since it was examined
            found.append(str(error))
            continue
        if same:
            first, second = one_line(other.index.path(image)), one_line(train.index.path(twin))
            found.append(f"{first}: the same content as {second}")
    return found


def statistics_of(split: Split) -> dict[str, object]:
    """Numbers of a split: images, classes, kinds, and the spread of sizes."""
    good = split.measures[split.measures[:, 1] > 0]
    classes = split.index.classes
    summary: dict[str, object] = {
        "images": len(split.index),
        "bad": split.bad,
        "classes": len(classes),
        "images_a_class": _spread(np.bincount(split.index.targets, minlength=len(classes))),
        "kinds": dict(split.kinds.most_common()),
        "left_out": dict(Counter(split.left_out).most_common()),
        "values": {kind: list(extent) for kind, extent in split.extents.items()},
        "gib": round(float(good[:, 0].sum()) / 2**30, 3),
    }
    for name, column in (("bytes", good[:, 0]), ("width", good[:, 1]), ("height", good[:, 2])):
        summary[name] = _spread(column)
    return summary


def value_range_of(train: Split) -> list[float] | None:
    """The data.value_range that fits the training images; None without images of more than 8 bits.

    Whole numbers from 0 on span what so many bits hold: 0..4095 for 12 bits. Floats from 0 to 1 span 0..1.
    """
    if not train.extents:
        return None
    low = min(extent[0] for extent in train.extents.values())
    high = max(extent[1] for extent in train.extents.values())
    floats = any(kind.endswith(" F") for kind in train.extents)
    if low < 0:
        return [low, max(high, low + 1)]
    if floats:
        return [0.0, 1.0 if high <= 1 else high]
    return [0.0, next((top for top in TOPS if high <= top), high)]


def _spread(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _examined(images: Examination, workers: int) -> Iterator[Examined]:
    """The examination of each image, in order."""
    workers = workers if len(images) > CHUNK else 0
    chunks = DataLoader(
        images,
        batch_size=CHUNK,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    try:
        for chunk in chunks:
            yield from chunk
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            "a process that decodes images died, of a file or for want of memory; try data.workers=0"
        ) from None
