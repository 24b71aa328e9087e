"""Find the one network that is wanted among a file's tensors, by what programs put around its names.

Lightning writes `net.` or `model.` before each name, and self-distillation saves a student and its averaged
teacher, each a `backbone.` with a head of its own.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

from deepvit_train.error import CheckpointError
from deepvit_train.run.tensor import listed

# What stands before the names of a network in a file: data parallel training, torch.compile, Lightning, DINO.
AROUND = re.compile(r"(?:(?:module|_orig_mod|net|model|backbone|encoder|student|teacher)\.)+")
# A network is where blocks are.
BLOCKS = re.compile(r"(?:blocks|transformer\.layers)\.\d+\.")

_Value = TypeVar("_Value")


def networks_in(
    file: Path, tensors: dict[str, _Value], weights: str
) -> tuple[str, dict[str, _Value], list[str]]:
    """Return the wanted network's kind, 'live' or 'ema', its tensors, and the names of the other network's.

    The names lose what stands around them, also those that belong to no network.

    Args:
        file: for messages.
        tensors: its content.
        weights: 'live' for the student, 'ema' or 'auto' for the teacher, where there are both.

    Raises CheckpointError where there are several networks, of which none is a teacher and none a student.
    """
    places = {name: _around(name) for name in tensors}
    found = sorted({place for name, place in places.items() if BLOCKS.match(name, len(place))})
    if len(found) < 2:
        kind = "ema" if found and "teacher." in found[0] else "live"
        return kind, _without(tensors, places, found), []
    wanted = "student." if weights == "live" else "teacher."
    chosen = [place for place in found if wanted in place]
    if len(chosen) != 1:
        raise CheckpointError(f"{file}: " + listed("holds several networks, under the names", found))
    others = [name for name, place in places.items() if _side(place) not in ("", _side(chosen[0]))]
    kept = {name: value for name, value in tensors.items() if name not in set(others)}
    return "live" if wanted == "student." else "ema", _without(kept, places, chosen), others


def _around(name: str) -> str:
    match = AROUND.match(name)
    return match[0] if match else ""


def _side(place: str) -> str:
    match = re.search(r"(?:student|teacher)\.", place)
    return match[0] if match else ""


def _without(tensors: dict[str, _Value], places: dict[str, str], found: list[str]) -> dict[str, _Value]:
    """Return tensors by their names without what stands around them, those of the network first."""
    inside = sorted(tensors, key=lambda name: places[name] not in found)
    bare: dict[str, _Value] = {}
    for name in inside:
        own = name.removeprefix(places[name])
        bare[name if own in bare else own] = tensors[name]
    return bare
