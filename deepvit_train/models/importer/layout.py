"""Describe how another program names its tensors, and translate them to this project's names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepvit_train.classes import TORCHVISION

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """Tensors as the rules of a layout expect them.

    Args:
        tensors: by the names that the rules know.
        left_out: names of tensors that the model has no use for: decoders, other heads, text towers.
        shown: what the file shows besides sizes, and what its program takes for granted, by keyword.
    """

    tensors: Tensors
    left_out: list[str]
    shown: dict[str, Any]


@dataclass(frozen=True)
class Translated(Prepared):
    """The same under this project's names.

    Args:
        layout: what the names were translated from.
    """

    layout: Layout


def unchanged(tensors: Tensors) -> Tensors:
    """Return the tensors as they are: the default of Layout.finish."""
    return tensors


def as_they_are(tensors: Tensors) -> Prepared:
    """Return the tensors as they are: the default of Layout.prepare."""
    return Prepared(tensors, [], {})


@dataclass(frozen=True)
class Layout:
    """The tensor names of another program's vision transformer, and the rules to translate them.

    Args:
        name: the layout's name in messages.
        mark: regular expression; a file has this layout if one of its names matches.
        rules: pairs of a regular expression for a whole name, and this project's name with \\1, \\2, ...
        norm_eps: epsilon of the LayerNorms, which no tensor shows; None: what is usual for the stem.
        finish: gives the renamed tensors the shapes of this project.
        class_order: the order of names in which the program numbers classes: torchvision's or timm's.
        prepare: brings older forms of the layout into the one that the rules know.
    """

    name: str
    mark: str
    rules: tuple[tuple[str, str], ...]
    norm_eps: float | None
    finish: Callable[[Tensors], Tensors] = unchanged
    class_order: str = TORCHVISION
    prepare: Callable[[Tensors], Prepared] = as_they_are

    def matches(self, names: list[str]) -> bool:
        """Return whether any of a file's names bears the mark of this layout."""
        return any(re.search(self.mark, name) for name in names)

    def translate(self, tensors: Tensors) -> tuple[Translated, list[str]]:
        """Return the tensors under this project's names, and the names that no rule matches."""
        known: Tensors = {}
        unread: list[str] = []
        prepared = self.prepare(tensors)
        for name, tensor in prepared.tensors.items():
            own = next((m.expand(new) for old, new in self.rules if (m := re.fullmatch(old, name))), None)
            if own is None or own in known:
                unread.append(name)
            else:
                known[own] = tensor
        return Translated(self.finish(known), prepared.left_out, prepared.shown, self), unread
