"""What the ranks of a run must share before the first step: configuration, classes, images and weights.

A rank with another learning rate, seed or data set would train on, to weights that nobody asked for.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import deepvit_train
from deepvit_train.console import amount, one_line
from deepvit_train.data.index import ImageIndex
from deepvit_train.distributed.agreement import differing, told
from deepvit_train.distributed.world import World
from deepvit_train.error import CheckpointError, ConfigError, DataError
from deepvit_train.training.images import sampled_sizes

# Each rank may have its own value: they say where it computes and where it reads, not what.
OWN_KEYS = {
    "data.class_map",
    "data.root",
    "data.workers",
    "trainer.device",
    "trainer.threads",
    "trainer.timeout_s",
}
# All ranks take over the first rank's values.
FIRST_RANKS = {"name", "run_dir"}
SAMPLED = 64  # files of each split whose sizes are compared
SHOWN = 3  # keys in a message
BLOCK = 4096  # bytes of a weights file that are compared at each of so many places


def check_config(world: World, config: dict[str, Any]) -> None:
    """Raise ConfigError on all ranks if they were started with different commands or versions.

    Args:
        config: all keys, dotted, with plain values.
    """
    facts = {key: value for key, value in config.items() if key not in OWN_KEYS | FIRST_RANKS}
    facts["version of deepvit-train"] = deepvit_train.__version__
    if odd := differing(world, facts):
        lines = [told(key, values) for key, values in odd.items()]
        more = f"; {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise ConfigError(
            f"{'; '.join(lines[:SHOWN])}{more}\nstart all ranks with one command; only "
            f"{', '.join(sorted(OWN_KEYS))} may differ"
        )


def check_data(world: World, classes: list[str], splits: dict[str, ImageIndex], sizes: bool) -> None:
    """Raise DataError on all ranks if they found different classes or images.

    Args:
        classes: the names of the model's outputs.
        splits: the images by the names of their splits.
        sizes: whether the sizes of some files are compared too.
    """
    if world.size == 1:
        return
    facts: dict[str, Any] = {"classes": classes}
    for name, index in splits.items():
        targets = hashlib.sha256(index.targets.tobytes()).hexdigest()
        sampled = sampled_sizes(index, SAMPLED).values() if sizes else []
        facts[name] = [len(index), index.digest, targets, *sampled]
    odd = differing(world, facts)
    if not odd:
        return
    if "classes" in odd:
        found = _other_class(odd["classes"])
    else:
        name = next(name for name in splits if name in odd)
        found = f"{name}: {_other_image(world, splits[name])}"
    raise DataError(
        f"{found}\nall ranks must read the same images; data.root may be a different path on each"
    )


def check_weights(world: World, weights: str | None) -> None:
    """Raise CheckpointError on all ranks if the file of initial weights is another one on some rank.

    Blocks spread over the file are compared, so that a large one takes no longer. What is no file, such as
    a run, is not compared.
    """
    content = None if weights is None else _sample_of(Path(weights).expanduser())
    if odd := differing(world, {"content": content}):
        rank = next(rank for rank, content in enumerate(odd["content"]) if content != odd["content"][0])
        raise CheckpointError(f"model.weights={weights}: is another file on rank {rank} than on rank 0")


def check_teacher(world: World, digest: str | None) -> None:
    """Raise CheckpointError on all ranks if they would learn from different teachers."""
    if odd := differing(world, {"distill.teacher, SHA-256": digest}):
        raise CheckpointError(told(*next(iter(odd.items()))))


def _sample_of(file: Path) -> list[Any] | None:
    """Return the size of a file and a digest of some of it, or None for what is no file."""
    if not file.is_file():
        return None
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as opened:
        for place in range(SAMPLED):
            opened.seek(place * size // SAMPLED)
            digest.update(opened.read(BLOCK))
    return [size, digest.hexdigest()]


def _other_class(classes: list[list[str]]) -> str:
    rank = next(rank for rank, names in enumerate(classes) if names != classes[0])
    mine, theirs = classes[0], classes[rank]
    place = next(
        (place for place, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]),
        min(len(mine), len(theirs)),
    )
    ours, other = (names[place] if place < len(names) else "missing" for names in (mine, theirs))
    return f"class {place} is {ours} on rank 0 and {other} on rank {rank}"


def _other_image(world: World, index: ImageIndex) -> str:
    """Name the first image that differs between rank 0 and the first rank that found other ones.

    All ranks must call this. Rank 0 sends its whole list, which happens only here, where the run ends. Sizes
    differ only where paths and classes do not.
    """
    for with_sizes in (False, True):
        mine = _listed(index, with_sizes)
        lines = world.gather(_first_other(world.first(mine), mine, world.rank))
        if (line := next(filter(None, lines), None)) is not None:
            return line
    return "the images differ"


def _first_other(ours: list[str], other: list[str], rank: int) -> str | None:
    if ours == other:
        return None
    pairs = enumerate(zip(ours, other, strict=False))
    place = next((place for place, pair in pairs if pair[0] != pair[1]), min(len(ours), len(other)))
    named = [images[place] if place < len(images) else "no image" for images in (ours, other)]
    return (
        f"image {place} is {named[0]} on rank 0 and {named[1]} on rank {rank} "
        f"(of {len(ours):,} and {amount(len(other), 'image')})"
    )


def _listed(index: ImageIndex, with_sizes: bool) -> list[str]:
    """Return the images by path and class, and by size where that is compared."""
    listed = [
        f"{one_line(index.path(image).removeprefix(f'{index.folder}/'))} of class {index.classes[target]}"
        for image, target in enumerate(index.targets.tolist())
    ]
    if with_sizes:
        for image, size in sampled_sizes(index, SAMPLED).items():
            listed[image] += f" with {size} bytes"
    return listed
