"""Measure what each block's attention contributes: to the tokens that pass it, and to the loss.

Shapes: L layers, B images, N tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit_train.models.walk import Walk, in_evaluation_mode, walk_through


def contributions(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor | None]], at_most: int | None = None
) -> dict[str, Tensor]:
    """Measure all blocks of a model on batches of images (B, 3, height, width) and classes (B,).

    A model with L blocks is run about L / 2 times for swaps, and as often for removals. The caller chooses
    the statistics that the BatchNorms of re-attention normalise with. The model's mode is put back after.

    Args:
        at_most: swap the maps of so many blocks only, evenly spread and the last among them, and remove none.

    Returns, as float64 means over images:
        'branch_share' (L,): mean |attention branch| / |x| over the tokens x that enter the block.
        'loss' (): the cross-entropy of the model as it is.
        'map_swap' (L - 1,): how much the loss rises when one of the blocks 1 to L - 1 uses the softmax maps
            of the block before in the place of its own. Re-attention mixes and normalises them as usual.
            With `at_most` it holds the chosen blocks alone.
        'removal' (L,): how much the loss rises when one block is left out.

    For batches without classes (None), only the first.
    """
    totals: dict[str, Tensor] = {}
    images = 0
    walk = walk_through(model)
    swapped = range(1, len(walk.blocks)) if at_most is None else _spread(len(walk.blocks), at_most)
    with in_evaluation_mode(model), torch.no_grad():
        for pixels, classes in batches:
            for name, value in _of_batch(walk, pixels, classes, set(swapped), at_most is None).items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + len(pixels) * value
            images += len(pixels)
    return {name: total / images for name, total in totals.items()}


def replaceable(map_swap: Tensor, rise: float) -> float:
    """Return the share of blocks whose loss rises by less than `rise` with the maps of the block before.

    The first block has none before it and does not count. (L - 1,) -> a share from 0 to 1; 0 for one block.
    """
    return float((map_swap < rise).double().mean()) if len(map_swap) else 0.0


def _spread(depth: int, count: int) -> list[int]:
    """Choose blocks of 1 to depth - 1, evenly spread. The last one is always among them."""
    last, count = depth - 1, min(count, depth - 1)
    return [last - round(place * last / count) for place in reversed(range(count))]


def _of_batch(
    walk: Walk, pixels: Tensor, classes: Tensor | None, chosen: set[int], removal: bool
) -> dict[str, Tensor]:
    shares, swapped, without = [], [], []
    x, before = walk.embed(pixels), None
    for index in range(len(walk.blocks)):
        passage = walk.through(index, x)
        shares.append((passage.branch.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-30)).mean())
        if classes is not None and removal:
            without.append(_loss(walk, index + 1, x, classes))
        if classes is not None and before is not None and index in chosen:
            other = walk.through(index, x, given=before)
            swapped.append(_loss(walk, index + 1, other.features, classes))
        x, before = passage.features, passage.before
    found = {"branch_share": torch.stack(shares).double().cpu()}
    if classes is not None:
        found["loss"] = _loss(walk, len(walk.blocks), x, classes)
        found["map_swap"] = _rises(swapped, found["loss"])
        if removal:
            found["removal"] = _rises(without, found["loss"])
    return found


def _rises(losses: list[Tensor], loss: Tensor) -> Tensor:
    return torch.stack(losses) - loss if losses else torch.zeros(0, dtype=torch.float64)


def _loss(walk: Walk, first: int, x: Tensor, classes: Tensor) -> Tensor:
    """Return the mean cross-entropy of tokens that enter the block `first`. -> (), float64."""
    return F.cross_entropy(walk.finish(first, x).float(), classes).double().cpu()
