"""Describe how another program names its tensors, and translate them to this project's names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deepvit_train.classes import TORCHVISION

Tensors = dict[str, Tensor]


def unchanged(tensors: Tensors) -> Tensors:
    """Return the tensors as they are: the default of Layout.finish."""
    return tensors


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
    """

    name: str
    mark: str
    rules: tuple[tuple[str, str], ...]
    norm_eps: float | None
    finish: Callable[[Tensors], Tensors] = unchanged
    class_order: str = TORCHVISION

    def matches(self, names: list[str]) -> bool:
        """Return whether any of a file's names bears the mark of this layout."""
        return any(re.search(self.mark, name) for name in names)

    def translate(self, tensors: Tensors) -> tuple[Tensors, list[str]]:
        """Return the tensors under this project's names, and the names that no rule matches."""
        known: Tensors = {}
        unread: list[str] = []
        for name, tensor in tensors.items():
            own = next((m.expand(new) for old, new in self.rules if (m := re.fullmatch(old, name))), None)
            if own is None or own in known:
                unread.append(name)
            else:
                known[own] = tensor
        return self.finish(known), unread
