"""Record the attention maps and features of every block, one block at a time.

Shapes: B batch, N tokens, D dim, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepvit_train.models.walk import Walk, in_evaluation_mode, walk_through


@dataclass(frozen=True)
class BlockRecord:
    """The maps and features of one block for a batch of images.

    Args:
        block: number of the block, from 0.
        mixes: whether it mixes its heads.
        before: softmax maps (B, H, N, N); rows are queries and sum to 1.
        after: the maps that multiply V (B, H, N, N): mixed and normalised, or the same as `before`.
        features: the tokens that leave the block (B, N, D).
        prefix: how many of them, from the first, are class token and registers.
    """

    block: int
    mixes: bool
    before: Tensor
    after: Tensor
    features: Tensor
    prefix: int


def record_maps(model: nn.Module, images: Tensor) -> Iterator[BlockRecord]:
    """Record what each block of a model does with images (B, C, height, width), from first block to last.

    The records come from an iterator, so that only one block's maps need memory at a time. Meanwhile the
    model is in evaluation mode and computes no gradients; afterwards it is in its own mode again. Maps are
    in float32 at least.

    Raises:
        ConfigError: the model has something that can't be recorded, which is named.
    """
    return _records(model, walk_through(model), images)


def _records(model: nn.Module, walk: Walk, images: Tensor) -> Iterator[BlockRecord]:
    with in_evaluation_mode(model):
        x = None
        for index in range(len(walk.blocks)):
            # no_grad ends with each block: between two a generator must leave its caller's mode alone.
            with torch.no_grad():
                passage = walk.through(index, walk.embed(images) if x is None else x)
            x = passage.features
            yield BlockRecord(index, walk.mixes(index), passage.before, passage.after, x, walk.prefix)
