"""Every file of a data set looked at once: what is wrong with it, and what it consists of."""

from __future__ import annotations

import filecmp
import hashlib
import multiprocessing
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepvit_train.data.decode import BadImageError, Limits, parse_picture, printable, read_file
from deepvit_train.data.folder import Walk
from deepvit_train.error import DataError

CHUNK = 64  # files handed to a process at a time


class Examined(NamedTuple):
    """What one file is. `bad` says why it can't be read, `damage` what a decoder complained of."""

    bad: str = ""
    damage: str = ""
    digest: int = 0
    size: int = 0
    width: int = 0
    height: int = 0
    kind: str = ""


@dataclass
class Split:
    """The files of one split and what was found in them. Errors make the check fail, warnings don't."""

    name: str
    classes: dict[str, int] = field(default_factory=dict)  # the number of images of each
    files: list[str] = field(default_factory=list)  # relative to the split's folder
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    measures: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))  # bytes, width, height
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


def list_split(root: Path, name: str, follow_links: bool) -> Split:
    """The files of a split, with an error for each folder that is missing, empty or led away."""
    split, walk = Split(name), Walk(root, name, follow_links)
    try:
        classes = walk.classes()
    except DataError as error:
        split.errors.append(str(error))
        return split
    for class_name in classes:
        try:
            found = walk.images(class_name)
        except DataError as error:
            split.errors.append(str(error))
            continue
        split.classes[class_name] = len(found)
        split.files += found
        if not found:
            split.errors.append(f"{root / name / class_name}: no image in this class")
    return split


def compare_classes(train: Split, other: Split) -> list[str]:
    """An error for each class that one split has and the other has not."""
    if not (train.classes and other.classes):
        return []
    return [
        f"class {name}: in {here.name}, not in {there.name}"
        for here, there in ((train, other), (other, train))
        for name in sorted(here.classes.keys() - there.classes.keys())
    ]


def examine_split(
    root: Path, split: Split, limits: Limits, workers: int, advance: Callable[[int], None]
) -> None:
    """Read and decode every file of a split, in so many processes, and note in it what was found."""
    folder = f"{root / split.name}/"
    split.measures = np.zeros((len(split.files), 3), np.int64)
    split.digests = np.zeros(len(split.files), np.uint64)
    for place, found in enumerate(_examined([folder + file for file in split.files], limits, workers)):
        split.measures[place] = found.size, found.width, found.height
        split.digests[place] = found.digest
        if found.bad:
            split.errors.append(found.bad)
        else:
            split.kinds[found.kind] += 1
        if found.damage and not found.bad:
            name = printable(folder + split.files[place])
            split.warnings.append(f"{name}: readable, but damaged ({found.damage})")
        advance(1)


def examine(limits: Limits, path: str) -> Examined:
    """Read and decode one file."""
    try:
        data = read_file(path, limits.max_bytes)
    except BadImageError as error:
        return Examined(bad=str(error))
    digest, size = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big"), len(data)
    try:
        picture = parse_picture(path, data, limits.max_pixels)
        picture.pixels()
    except BadImageError as error:
        return Examined(bad=str(error), digest=digest, size=size)
    damage = "; ".join([*picture.damage, *_png_damage(data)])
    return Examined("", damage, digest, size, picture.width, picture.height, picture.kind)


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


def duplicates(root: Path, train: Split, other: Split) -> list[str]:
    """An error for each file of the other split whose content is also in train."""
    order = np.argsort(train.digests)
    ranks = np.searchsorted(train.digests, other.digests, sorter=order).clip(max=len(order) - 1)
    found = []
    for place in np.flatnonzero(np.isin(other.digests, train.digests) & (other.measures[:, 0] > 0)):
        first = f"{root / other.name}/{other.files[place]}"
        second = f"{root / train.name}/{train.files[order[ranks[place]]]}"
        if filecmp.cmp(first, second, shallow=False):
            found.append(f"{printable(first)}: the same content as {printable(second)}")
    return found


def statistics_of(split: Split) -> dict[str, object]:
    """Numbers of a split: images, classes, kinds, and the spread of sizes."""
    good = split.measures[split.measures[:, 1] > 0]
    counts = sorted(split.classes.values())
    summary: dict[str, object] = {
        "images": len(split.files),
        "classes": len(split.classes),
        "images_a_class": _spread(np.array(counts)),
        "kinds": dict(split.kinds.most_common()),
        "gib": round(float(good[:, 0].sum()) / 2**30, 3),
    }
    for name, column in (("bytes", good[:, 0]), ("width", good[:, 1]), ("height", good[:, 2])):
        summary[name] = _spread(column)
    return summary


def _spread(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {"min": int(values.min()), "median": int(np.median(values)), "max": int(values.max())}


def _examined(paths: list[str], limits: Limits, workers: int) -> Iterator[Examined]:
    """The examination of each path, in order."""
    look = partial(examine, limits)
    if workers == 0 or len(paths) <= CHUNK:
        yield from map(look, paths)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            yield from pool.map(look, paths, chunksize=CHUNK)
        except BrokenProcessPool:
            raise DataError(
                "a process that decodes images died, of a file or for want of memory; try data.workers=0"
            ) from None
