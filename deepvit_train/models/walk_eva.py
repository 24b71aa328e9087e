"""Walk through timm's Eva models block by block: EVA-02, DINOv3, Perception Encoder and others.

Shapes: B batch, N tokens, D dim, H heads, K head_dim, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor

from deepvit_train.error import ConfigError
from deepvit_train.models.reattention import softmax_maps
from deepvit_train.models.walk import Passage, TimmWalk


class EvaWalk(TimmWalk):
    """An Eva model as a row of blocks. Its rotary positions are those of the images that were embedded last.

    Raises:
        ConfigError: a block or an attention is of another kind, which is named.
    """

    def __init__(self, model: Eva) -> None:
        for index, block in enumerate(model.blocks):
            for part, kinds in ((block, (EvaBlock,)), (block.attn, (EvaAttention, AttentionRope))):
                if type(part) not in kinds:
                    raise ConfigError(
                        f"blocks.{index}: {type(part).__name__} can't be recorded; of timm's Eva "
                        "models those with EvaBlock and EvaAttention or AttentionRope can"
                    )
        super().__init__(model)
        self.model = model
        self.rope: Tensor | None = None

    def embed(self, images: Tensor) -> Tensor:
        x, self.rope = self.model._pos_embed(self.model.patch_embed(images))
        return self.model.norm_pre(x)

    def through(self, block: int, x: Tensor, given: Tensor | None = None) -> Passage:
        part = self.blocks[block]
        branch, maps = _attention(part.attn, part.norm1(x), self._rope_of(block), given)
        branch = part.drop_path1(_scaled(part.gamma_1, branch))
        attended = x + branch
        out = part.drop_path2(_scaled(part.gamma_2, part.mlp(part.norm2(attended))))
        return Passage(attended + out, branch, maps, maps)

    def advance(self, block: int, x: Tensor) -> Tensor:
        return self.blocks[block](x, rope=self._rope_of(block))

    def _rope_of(self, block: int) -> Tensor | None:
        """Return a block's rotary positions: (N, 2 K), or its own of (L, H, N, 2 K)."""
        own = getattr(self.model, "rope_mixed", False) and self.rope is not None
        return self.rope[block] if own and self.rope is not None else self.rope


def _scaled(gamma: Tensor | None, branch: Tensor) -> Tensor:
    return branch if gamma is None else gamma * branch


def _attention(attn: Any, x: Tensor, rope: Tensor | None, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute what an Eva model's attention does, and its maps. (B, N, D) -> (B, N, D), (B, H, N, N)."""
    q, k, v = _heads(attn, x)
    q, k = (_turned(attn, each, rope).type_as(v) for each in (attn.q_norm(q), attn.k_norm(k)))
    groups = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(groups, dim=1) if groups > 1 else each for each in (k, v))
    with torch.autocast(x.device.type, enabled=False):
        full = torch.promote_types(x.dtype, torch.float32)
        maps = softmax_maps(q.to(full), k.to(full)) if given is None else given
        out = (maps @ v.to(full)).to(v.dtype)
    out = attn.norm(rearrange(out, "b h n k -> b n (h k)"))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out)), maps


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values, each (B, H, N, K)."""
    if attn.qkv is None:
        parts = (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x))
    else:
        both = attn.qkv(x)
        if getattr(attn, "q_bias", None) is not None:
            both = both + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        parts = both.chunk(3, dim=-1)
    return tuple(rearrange(part, "b n (h k) -> b h n k", k=attn.head_dim) for part in parts)


def _turned(attn: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Rotate queries or keys (B, H, N, K) by their positions, all but those of class token and registers."""
    if rope is None:
        return x
    prefix, patches = x.tensor_split([attn.num_prefix_tokens], dim=2)
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=attn.rotate_half)], dim=2)
