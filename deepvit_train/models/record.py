"""Record the attention maps and features of every block, one block at a time.

This works on DeepViT and on timm's VisionTransformer. timm's fused attention gives no maps, so they are
computed here from its queries and keys.

Shapes: B batch, N tokens, D dim, H heads, K head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from timm.layers import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deepvit_train.error import ConfigError
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.reattention import softmax_maps


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
    if isinstance(model, DeepViT):
        steps = _steps(model, images)
    elif isinstance(model, VisionTransformer):
        _check_recordable(model)
        steps = _timm_steps(model, images)
    else:
        raise ConfigError(
            f"{type(model).__name__}: attention maps are recorded from deepvit_train's models and timm's "
            "VisionTransformer"
        )
    return _in_evaluation_mode(model, steps)


def _in_evaluation_mode(model: nn.Module, steps: Iterator[BlockRecord]) -> Iterator[BlockRecord]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        while True:
            # no_grad ends with each step: between two steps a generator must leave its caller's mode alone.
            with torch.no_grad():
                record = next(steps, None)
            if record is None:
                return
            yield record
    finally:
        for module, training in modes.items():
            module.training = training


def _steps(model: DeepViT, images: Tensor) -> Iterator[BlockRecord]:
    x = model.embed(images)
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        x, before, after = block.forward_with_maps(x)
        yield BlockRecord(index, model.attn.mixes(index), before, after, x, model.num_prefix_tokens)


def _timm_steps(model: VisionTransformer, images: Tensor) -> Iterator[BlockRecord]:
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    blocks: Any = model.blocks
    for index, block in enumerate(blocks):
        maps = _timm_maps(block.attn, block.norm1(x))
        x = block(x)
        yield BlockRecord(index, False, maps, maps, x, model.num_prefix_tokens)


def _timm_maps(attn: TimmAttention, x: Tensor) -> Tensor:
    q, k, _ = rearrange(attn.qkv(x), "b n (three h k) -> three b h n k", three=3, h=attn.num_heads)
    q, k = attn.q_norm(q), attn.k_norm(k)
    with torch.autocast(x.device.type, enabled=False):
        full = torch.promote_types(x.dtype, torch.float32)
        return softmax_maps(q.to(full), k.to(full))


def _check_recordable(model: VisionTransformer) -> None:
    for index, block in enumerate(model.blocks):
        if type(block) is not TimmBlock or type(block.attn) is not TimmAttention:
            kind = type(block).__name__ if type(block) is not TimmBlock else type(block.attn).__name__
            raise ConfigError(f"blocks.{index}: {kind} can't be recorded; timm's own Block and Attention can")
