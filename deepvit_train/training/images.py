"""Which images a run reads, and which were added or removed since its checkpoint.

A checkpoint keeps a digest of the index of each split: of the paths below its folder and their classes. It
also keeps the sizes of a few files. The run's folder keeps the paths themselves, once for each digest, so
that a later start can tell the difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deepvit_train.atomic import RefusedError, inside, make_folder, replacing
from deepvit_train.console import one_line
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.kept import KeptBytes, KeptPixels, free_memory
from deepvit_train.data.transform import EvalTransform, Transform
from deepvit_train.distributed.launch import local_size
from deepvit_train.error import CheckpointError, DataError, OutputError
from deepvit_train.reading import open_file

FOLDER = "images"  # in the run's folder
SHOWN = 3  # paths in a line
EXPECTED_BY = 64  # files by which the size of all is expected
SAMPLED = 16  # files of a split whose sizes a checkpoint keeps


def summary(splits: dict[str, ImageIndex]) -> dict[str, dict[str, Any]]:
    """Return the number of images of each split, the digest of its index and some sizes, for a checkpoint."""
    return {
        name: {
            "images": len(index),
            "digest": index.digest,
            "bytes": [*sampled_sizes(index, SAMPLED).values()],
        }
        for name, index in splits.items()
    }


def sampled_sizes(index: ImageIndex, count: int) -> dict[int, int]:
    """Return the sizes in bytes of at most so many images, evenly spaced, by their places in the index.

    The size is -1 where there is no file.
    """
    count = min(count, len(index))
    return {image: _size(index, image) for image in (place * len(index) // count for place in range(count))}


def _size(index: ImageIndex, image: int) -> int:
    if index.tars is not None:
        return int(index.tars.places[image, 2])
    try:
        return Path(index.path(image)).stat().st_size
    except OSError:
        return -1


def kept_in_memory(
    splits: Sequence[tuple[ImageIndex, Transform]], say: Callable[[str], None]
) -> list[ImageIndex]:
    """Return the splits with memory for what is read of their images, and say how much it may take.

    That is half of the memory that is free, shared by the ranks of this host. Each split gets its share of it
    by the size that is expected. Where the system does not allow it, nothing is kept.

    Args:
        splits: each with the transform that its images are read with most. Where that draws nothing at
            random, pixels are kept, so that nothing is decoded again; else the bytes of the files.
        say: is called with a line.
    """
    indexes = [index for index, _ in splits]
    sizes = [
        3 * transform.size**2 * len(index) if isinstance(transform, EvalTransform) else _expected_size(index)
        for index, transform in splits
    ]
    limit, wanted = free_memory() // 2 // local_size(), sum(sizes)
    shares = [limit * size // wanted for size in sizes] if wanted else [0] * len(sizes)
    try:
        kept = [KeptBytes(len(index), share) for index, share in zip(indexes, shares, strict=True)]
    except OSError as error:
        say(f"cache: none, because the system does not allow {limit / 2**20:,.0f} MiB ({error.strerror})")
        return indexes
    told = "all" if wanted <= limit else f"{limit / wanted:.0%}"
    say(
        f"cache: up to {limit / 2**20:,.0f} MiB of memory for the images that were read; all will be about "
        f"{wanted / 2**20:,.0f} MiB, so {told} of them fit"
    )
    return [
        replace(index, kept=KeptPixels(transform, each) if isinstance(transform, EvalTransform) else each)
        for (index, transform), each in zip(splits, kept, strict=True)
    ]


def _expected_size(index: ImageIndex) -> int:
    """Return about how many bytes the files of a split have, by some of them."""
    sizes = [size for size in sampled_sizes(index, EXPECTED_BY).values() if size > 0]
    return round(sum(sizes) / len(sizes) * len(index)) if sizes else 0


def check_others(run: Path, before: dict[str, Any], index: ImageIndex) -> None:
    """Raise DataError where the training images have nothing in common with those that a run was trained on.

    Args:
        run: the run's folder.
        before: what `summary` returned for a checkpoint of the run.
        index: the training images now.
    """
    known = before.get("train")
    if known is None:
        return
    if known["digest"] == index.digest:
        sizes, then = sampled_sizes(index, SAMPLED).values(), known.get("bytes") or []
        others = bool(then) and all(size != old for size, old in zip(sizes, then, strict=False))
        what = "is here with the same path and size"
    else:
        former = _read(_file(run, known["digest"]))
        others = former is not None and former.isdisjoint(_paths(index.paths, index.ends))
        what = "is here under the same path"
    if others:
        raise DataError(
            f"{index.title}: none of the {known['images']:,} images that {run} was trained on {what}\n"
            f"name=NEW begins a run of its own; with resume={run} too, it goes on from that run's weights"
        )


def keep(run: Path, splits: dict[str, ImageIndex]) -> None:
    """Write the paths of each split into the run's folder, unless they are there. Raises OutputError."""
    for index in splits.values():
        file = _file(run, index.digest)
        try:
            make_folder(run, FOLDER)
        except OSError as error:
            raise OutputError(f"{file.parent}: can't be written ({error.strerror})") from None
        if not file.exists():
            with replacing(file, flush=False) as opened:
                # One after the other: an archive would take three times as long, for its checksums.
                np.save(opened, index.paths, allow_pickle=False)
                np.save(opened, index.ends, allow_pickle=False)


def changes(run: Path, before: dict[str, Any], splits: dict[str, ImageIndex]) -> Iterator[str]:
    """Say of each split which images were added or removed.

    Args:
        run: the folder of the run that wrote the checkpoint.
        before: what `summary` returned then; empty for a checkpoint of a version that kept nothing.
    """
    for name, index in splits.items():
        known = before.get(name)
        if known is None or known["digest"] == index.digest:
            continue
        former = _read(_file(run, known["digest"]))
        counts = f"{index.title}: other images than at the checkpoint, {known['images']:,} then"
        if former is None:
            yield f"{counts} and {len(index):,} now"
            continue
        now = _paths(index.paths, index.ends)
        found = [("added", now - former), ("removed", former - now)]
        told = [f"{len(paths):,} {what} ({_listed(paths)})" for what, paths in found if paths]
        yield f"{counts} and {len(index):,} now: {', '.join(told) or 'the same paths, of other classes'}"


def read_paths(run: Path, digest: str) -> set[bytes] | None:
    """Return the paths of the split of a digest that a run's folder keeps, or None where it keeps none."""
    return _read(_file(run, digest))


def _file(run: Path, digest: str) -> Path:
    return run / FOLDER / f"{digest}.npy"


def _read(file: Path) -> set[bytes] | None:
    """Return the paths that a file keeps, or None where there is none that can be read."""
    try:
        inside(file.parent.parent, FOLDER)
        with open_file(file) as opened:
            paths, ends = (np.load(opened, allow_pickle=False) for _ in range(2))
            return _paths(paths, ends) if _fit(paths, ends) else None
    # A file that claims more than the memory holds is a damaged one.
    except (OSError, ValueError, EOFError, MemoryError, CheckpointError, RefusedError):
        return None


def _fit(paths: np.ndarray, ends: np.ndarray) -> bool:
    """Return whether the ends lie one after the other in the text of the paths."""
    whole = paths.dtype == np.uint8 and paths.ndim == ends.ndim == 1 and ends.dtype.kind in "iu"
    return whole and bool((np.diff(ends, prepend=0) >= 0).all()) and ends.max(initial=0) <= len(paths)


def _paths(paths: np.ndarray, ends: np.ndarray) -> set[bytes]:
    text, places = paths.tobytes(), [0, *ends.tolist()]
    return {text[start:end] for start, end in pairwise(places)}


def _listed(paths: set[bytes]) -> str:
    first = [one_line(os.fsdecode(path)) for path in sorted(paths)[:SHOWN]]
    return ", ".join([*first, *(["..."] if len(paths) > SHOWN else [])])
