"""What a layout of tensor names is, and the way from it to this project's own names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from deepvit_train.classes import TORCHVISION

Tensors = dict[str, Tensor]


def unchanged(tensors: Tensors) -> Tensors:
    """The default of Layout.finish."""
    return tensors


@dataclass(frozen=True)
class Layout:
    """How another program names the tensors of a vision transformer.

    Args:
        name: for messages.
        mark: a regular expression; a file where some name matches is of this layout.
        rules: (regular expression of a whole name, its own name with \\1, \\2, ...).
        norm_eps: epsilon of that program's LayerNorms, which no tensor shows; None: as usual for the stem.
        finish: turns tensors that have their own names already into the shapes of this project.
        class_order: the order of names in which that program numbers classes: torchvision's or timm's.
    """

    name: str
    mark: str
    rules: tuple[tuple[str, str], ...]
    norm_eps: float | None
    finish: Callable[[Tensors], Tensors] = unchanged
    class_order: str = TORCHVISION

    def matches(self, names: list[str]) -> bool:
        """Whether these are names of this layout."""
        return any(re.search(self.mark, name) for name in names)

    def translate(self, tensors: Tensors) -> tuple[Tensors, list[str]]:
        """The tensors under their own names, and the names that no rule knows."""
        known: Tensors = {}
        unread: list[str] = []
        for name, tensor in tensors.items():
            own = next((m.expand(new) for old, new in self.rules if (m := re.fullmatch(old, name))), None)
            if own is None or own in known:
                unread.append(name)
            else:
                known[own] = tensor
        return self.finish(known), unread
