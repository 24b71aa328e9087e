"""Walk through a model block by block, see what each one computes, or let it compute with other maps.

This works on DeepViT, on timm's VisionTransformer and, by walk_eva.py, on timm's Eva. timm's fused attention
gives no maps, so they are computed here from its queries and keys.

Shapes: B batch, N tokens, D dim, H heads, K head_dim, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from timm.layers import Attention as TimmAttention
from timm.models.eva import Eva
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deepvit_train.error import ConfigError
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.reattention import softmax_maps


@dataclass(frozen=True)
class Passage:
    """What a block did with its tokens.

    Args:
        features: the tokens that leave the block (B, N, D).
        branch: what its attention added to the tokens that came in (B, N, D).
        before: softmax maps (B, H, N, N), in float32 at least; rows are queries and sum to 1.
        after: the maps that multiply V (B, H, N, N): mixed and normalised, or the same as `before`.
    """

    features: Tensor
    branch: Tensor
    before: Tensor
    after: Tensor


class Walk(ABC):
    """A model as a row of blocks between `embed` and `classify`."""

    def __init__(self, model: DeepViT | VisionTransformer | Eva) -> None:
        self.prefix: int = model.num_prefix_tokens  # class token and registers, the first tokens
        self.has_class_token: bool = getattr(model, "cls_token", None) is not None
        self.blocks: Any = model.blocks

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before the first block. (B, 3, height, width) -> (B, N, D)."""

    @abstractmethod
    def through(self, block: int, x: Tensor, given: Tensor | None = None) -> Passage:
        """Send tokens (B, N, D) through one block. Softmax maps that are `given` replace its own."""

    def advance(self, block: int, x: Tensor) -> Tensor:
        """Send tokens (B, N, D) through one block as the model does, without a look at its maps."""
        return self.blocks[block](x)

    @abstractmethod
    def normalise(self, x: Tensor) -> Tensor:
        """Apply the final norm to tokens (B, N, D), except where the head does so itself."""

    @abstractmethod
    def classify(self, x: Tensor) -> Tensor:
        """Return the logits of tokens that left the last block. (B, N, D) -> (B, C)."""

    @abstractmethod
    def mixes(self, block: int) -> bool:
        """Return whether a block mixes its heads."""

    def finish(self, first: int, x: Tensor) -> Tensor:
        """Send tokens (B, N, D) through the blocks from `first` on, and return the logits (B, C)."""
        for block in range(first, len(self.blocks)):
            x = self.advance(block, x)
        return self.classify(x)

    def outcomes(self, images: Tensor) -> Iterator[Tensor]:
        """Give the tokens (B, N, D) that leave each block, as a model that ended there would return them."""
        x = self.embed(images)
        for block in range(len(self.blocks)):
            x = self.advance(block, x)
            yield self.normalise(x)


class _OwnWalk(Walk):
    def __init__(self, model: DeepViT) -> None:
        super().__init__(model)
        self.model = model

    def embed(self, images: Tensor) -> Tensor:
        return self.model.embed(images)

    def through(self, block: int, x: Tensor, given: Tensor | None = None) -> Passage:
        attended, before, after = self.blocks[block].attend_with_maps(x, given)
        return Passage(self.blocks[block].transform(attended), attended - x, before, after)

    def normalise(self, x: Tensor) -> Tensor:
        return self.model.normalise(x)

    def classify(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.normalise(x))

    def mixes(self, block: int) -> bool:
        return self.model.attn.mixes(block)


class TimmWalk(Walk):
    """What the walks through timm's models share: their head, and that no block mixes its heads."""

    model: Any

    def normalise(self, x: Tensor) -> Tensor:
        return self.model.norm(x)

    def classify(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.normalise(x))

    def mixes(self, block: int) -> bool:
        return False


class _VisionTransformerWalk(TimmWalk):
    def __init__(self, model: VisionTransformer) -> None:
        for index, block in enumerate(model.blocks):
            if type(block) is not TimmBlock or type(block.attn) is not TimmAttention:
                kind = type(block).__name__ if type(block) is not TimmBlock else type(block.attn).__name__
                raise ConfigError(
                    f"blocks.{index}: {kind} can't be recorded; timm's own Block and Attention can"
                )
        super().__init__(model)
        self.model = model

    def embed(self, images: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))

    def through(self, block: int, x: Tensor, given: Tensor | None = None) -> Passage:
        part = self.blocks[block]
        out, maps = _timm_attention(part.attn, part.norm1(x), given)
        branch = part.drop_path1(part.ls1(out))
        attended = x + branch
        return Passage(
            attended + part.drop_path2(part.ls2(part.mlp(part.norm2(attended)))), branch, maps, maps
        )


def walk_through(model: nn.Module) -> Walk:
    """Return a walk through a model. Raises ConfigError if the model is of a kind that can't be recorded."""
    if isinstance(model, DeepViT):
        return _OwnWalk(model)
    if isinstance(model, VisionTransformer):
        return _VisionTransformerWalk(model)
    if isinstance(model, Eva):
        from deepvit_train.models.walk_eva import EvaWalk  # it is a Walk, so it needs this module first

        return EvaWalk(model)
    raise ConfigError(
        f"{type(model).__name__}: attention maps are recorded from deepvit_train's models, and from timm's "
        "VisionTransformer (ViT, DeiT, DINOv2, CLIP, SigLIP) and Eva (EVA-02, DINOv3, Perception Encoder)"
    )


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Let a model evaluate. Afterwards each of its parts is in its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _timm_attention(attn: TimmAttention, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute what timm's attention does, and its maps. (B, N, D) -> (B, N, D), (B, H, N, N)."""
    q, k, v = rearrange(attn.qkv(x), "b n (three h k) -> three b h n k", three=3, h=attn.num_heads)
    q, k = attn.q_norm(q), attn.k_norm(k)
    with torch.autocast(x.device.type, enabled=False):
        full = torch.promote_types(x.dtype, torch.float32)
        maps = softmax_maps(q.to(full), k.to(full)) if given is None else given
        out = (maps @ v.to(full)).to(v.dtype)
    out = attn.norm(rearrange(out, "b h n k -> b n (h k)"))
    gate = getattr(attn, "gate", None)  # older versions have none
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out)), maps
