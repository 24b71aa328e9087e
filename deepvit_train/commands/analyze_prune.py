"""Leave blocks out of a model, those first that are missed least, and measure accuracy after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from deepvit_train.evaluation.accuracy import EvalResult
from deepvit_train.models import DeepViT


def prune(
    model: DeepViT, removal: Sequence[float], measure: Callable[[], EvalResult]
) -> dict[str, list[float]]:
    """Remove one block after the other, and measure what is left, without training it.

    Args:
        removal: how much the loss rises without each block. The one with the least goes first.
        measure: evaluates the model as it is.

    Returns 'order', the blocks in the order in which they go; 'top1' and 'loss' with 0, 1, 2 ... blocks
    removed. The first block in `order` is gone in the second value. One block always stays.
    """
    order = sorted(range(len(removal)), key=lambda block: (removal[block], block))
    found: dict[str, list[Any]] = {"order": order, "top1": [], "loss": []}
    for count in range(len(order)):
        with _without(model, set(order[:count])):
            result = measure()
        found["top1"].append(result.top1)
        found["loss"].append(result.loss)
    return found


@contextmanager
def _without(model: DeepViT, gone: set[int]) -> Iterator[None]:
    blocks = model.blocks
    model.blocks = nn.Sequential(*[block for index, block in enumerate(blocks) if index not in gone])
    try:
        yield
    finally:
        model.blocks = blocks
