"""The arithmetic of re-attention: one function, exact and straightforward.

    ReAttention(Q, K, V) = scale * Norm(Theta^T softmax(Q K^T / sqrt(K))) V        (arXiv 2103.11886, Eq. 3)

Shapes: B batch, N tokens, H heads, K head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from deepvit_train.models.reattention.operator import operator


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


def plain_reattention(
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
    """What `reattention` computes, written as the formula reads; every map is kept for the backward pass."""
    with torch.autocast(q.device.type, enabled=False):
        full = torch.promote_types(v.dtype, torch.float32)
        maps = F.dropout(softmax_maps(q.to(full), k.to(full)), dropout)
        mixed = mix_heads(maps, theta, theta_bias, norm, scale)
        return (mixed @ v.to(full)).to(v.dtype)


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
    chunk: int = 0,
    sync: bool = False,
) -> Tensor:
    """Re-attention's output for queries, keys and values of shape (B, H, N, K).

    Exact in function, gradient and running statistics, but for rounding and for the dropout masks drawn;
    keeps q, k, v and the output for the backward pass, and no map. Differentiable once.

    Works in float32 at least, whatever autocast says: the maps hug 1/N, and the norm would amplify the
    rounding of half precision (docs/decisions/0004-half-precision.md).

    Args:
        q, k, v: (B, H, N, K).
        theta, theta_bias, norm, scale: as in `mix_heads`. A norm that is neither BatchNorm2d nor LayerNorm is
            called as a module on maps that are kept.
        dropout: probability of dropping an entry of the softmax maps, before mixing; 0 outside training.
        chunk: rows of maps (queries, counted over images) worked on at a time; 0: chosen from the sizes.
        sync: whether BatchNorm's batch statistics are those of all ranks' batches, which must be of one size.

    Returns:
        (B, H, N, K), in the type of v.
    """
    if norm is not None and type(norm) not in (nn.BatchNorm2d, nn.LayerNorm):
        return plain_reattention(q, k, v, theta, theta_bias, norm, scale=scale, dropout=dropout)
    full = torch.promote_types(v.dtype, torch.float32)
    theta, bias = theta.to(full), None if theta_bias is None else theta_bias.to(full)
    weight, shift = _affine(norm, theta)
    if scale != 1.0:
        weight, shift = scale * weight, scale * shift
    mode = _mode(norm, sync)
    count = q.shape[0] * q.shape[2] ** 2 * (distributed.get_world_size() if mode == "ranks" else 1)
    if mode in ("batch", "ranks") and count <= 1:
        raise ValueError(f"BatchNorm needs more than one value per head to train, got q {tuple(q.shape)}")
    if mode == "none":  # nothing is left to do on maps but to mix them
        if (
            isinstance(norm, nn.BatchNorm2d)
            and norm.running_mean is not None
            and norm.running_var is not None
        ):
            weight = weight * (norm.running_var.to(full) + norm.eps).rsqrt()
            shift = shift - weight * norm.running_mean.to(full)
        if bias is not None:
            shift, bias = shift + weight * bias, None
    eps = 0.0 if norm is None else norm.eps
    seed = torch.randint(2**62, (), device="cpu") if dropout else None
    out, _, mean, var = operator(q, k, v, theta, bias, weight, shift, seed, mode, eps, dropout, chunk)
    if mode in ("batch", "ranks") and isinstance(norm, nn.BatchNorm2d) and norm.training:
        _update_running_statistics(norm, mean if bias is None else mean + bias, var, count)
    return out


def _mode(norm: nn.Module | None, sync: bool) -> str:
    """What M is normalised over: the 'batch', those of all 'ranks', each 'layer' of heads, or 'none'."""
    if isinstance(norm, nn.LayerNorm):
        return "layer"
    has_running = norm is not None and norm.running_mean is not None and norm.running_var is not None
    if norm is None or (has_running and not norm.training):
        return "none"
    return "ranks" if sync and norm.training and distributed.is_initialized() else "batch"


def _affine(norm: nn.Module | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The norm's weight and bias, (H,) each; 1 and 0 where it has none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return (
        like.new_ones(len(like)) if weight is None else weight.to(like.dtype),
        like.new_zeros(len(like)) if bias is None else bias.to(like.dtype),
    )


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """As nn.BatchNorm2d does: the unbiased variance, by momentum, or the mean of all batches without one."""
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    unbiased = var * (count / (count - 1))
    if norm.momentum is not None and mean.is_cuda:  # two launches instead of eight
        torch._foreach_lerp_([norm.running_mean, norm.running_var], [mean, unbiased], norm.momentum)
        return
    rate = 1.0 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.copy_((1 - rate) * running + rate * new)
