"""The arithmetic of re-attention: one function, exact and straightforward.

    ReAttention(Q, K, V) = scale * Norm(Theta^T softmax(Q K^T / sqrt(K))) V        (arXiv 2103.11886, Eq. 3)

Shapes: B batch, N tokens, H heads, K head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def softmax_maps(q: Tensor, k: Tensor) -> Tensor:
    """The maps before mixing: softmax(q k^T / sqrt(K)) over keys. (B, H, N, K) twice -> (B, H, N, N)."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1)


def mix_heads(
    maps: Tensor, theta: Tensor, theta_bias: Tensor | None, norm: nn.Module | None, scale: float
) -> Tensor:
    """The maps after mixing: mixed[g] = scale * Norm(sum_h maps[h] * theta[h, g] + theta_bias[g]).

    Args:
        maps: (B, H, N, N), softmax maps.
        theta: (H, H), rows are input heads and columns output heads.
        theta_bias: (H,) or None.
        norm: BatchNorm2d(H), whose mode decides between batch and running statistics; LayerNorm(H), which
            normalises across heads at each (query, key); or None.
        scale: what the normalised maps are multiplied by.
    """
    mixed = torch.einsum("bhij,hg->bgij", maps, theta)
    if theta_bias is not None:
        mixed = mixed + rearrange(theta_bias, "h -> h 1 1")
    if isinstance(norm, nn.LayerNorm):
        mixed = rearrange(norm(rearrange(mixed, "b h i j -> b i j h")), "b i j h -> b h i j")
    elif norm is not None:
        mixed = norm(mixed)
    return mixed if scale == 1.0 else mixed * scale


def reattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    theta_bias: Tensor | None = None,
    norm: nn.Module | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Re-attention's output for queries, keys and values of shape (B, H, N, K).

    Works in float32 at least, whatever autocast says: the maps hug 1/N, and the norm would amplify the
    rounding of half precision (docs/decisions/0004-half-precision.md).

    Args:
        q, k, v: (B, H, N, K).
        theta, theta_bias, norm, scale: as in `mix_heads`.
        dropout: probability of dropping an entry of the softmax maps, before mixing; 0 outside training.

    Returns:
        (B, H, N, K), in the type of v.
    """
    with torch.autocast(q.device.type, enabled=False):
        full = torch.promote_types(v.dtype, torch.float32)
        maps = F.dropout(softmax_maps(q.to(full), k.to(full)), dropout)
        mixed = mix_heads(maps, theta, theta_bias, norm, scale)
        return (mixed @ v.to(full)).to(v.dtype)
