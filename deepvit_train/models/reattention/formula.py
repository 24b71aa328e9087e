"""Compute re-attention: the formula as it reads, and a function that gives the same without keeping a map.

    ReAttention(Q, K, V) = scale * Norm(Theta^T softmax(Q K^T / sqrt(K))) V        (arXiv 2103.11886, Eq. 3)

Shapes: B batch, N tokens, H heads, K head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from deepvit_train.models.reattention.centring import Centring
from deepvit_train.models.reattention.operator import call_operator


class HeadMixer(NamedTuple):
    """The mixing that turns the softmax maps of a block into the maps that multiply V.

    Args:
        theta: (H, H), rows are input heads and columns output heads.
        bias: (H,) or None.
        norm: BatchNorm2d(H), whose mode decides between batch and running statistics; LayerNorm(H), which
            normalises across heads at each (query, key); Centring, which works on each row; or None.
        scale: the factor on the normalised maps.
    """

    theta: Tensor
    bias: Tensor | None = None
    norm: nn.Module | None = None
    scale: float = 1.0


def softmax_maps(q: Tensor, k: Tensor) -> Tensor:
    """Return the maps before mixing, softmax(q k^T / sqrt(K)). (B, H, N, K) twice -> (B, H, N, N)."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1)


def mix_heads(maps: Tensor, mixer: HeadMixer) -> Tensor:
    """Return scale * Norm(sum_h maps[h] * theta[h, g] + bias[g]) for each head g. (B, H, N, N)."""
    theta, bias, norm, scale = mixer
    mixed = torch.einsum("bhij,hg->bgij", maps, theta)
    if bias is not None:
        mixed = mixed + rearrange(bias, "h -> h 1 1")
    if isinstance(norm, nn.LayerNorm):
        mixed = rearrange(norm(rearrange(mixed, "b h i j -> b i j h")), "b i j h -> b h i j")
    elif norm is not None:
        mixed = norm(mixed)
    return mixed if scale == 1.0 else mixed * scale


def plain_reattention(q: Tensor, k: Tensor, v: Tensor, mixer: HeadMixer, *, dropout: float = 0.0) -> Tensor:
    """Compute the same as `reattention`, as the formula reads. Keeps every map for the backward pass."""
    with torch.autocast(q.device.type, enabled=False):
        full = torch.promote_types(v.dtype, torch.float32)
        maps = F.dropout(softmax_maps(q.to(full), k.to(full)), dropout)
        return (mix_heads(maps, mixer) @ v.to(full)).to(v.dtype)


def reattention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixer: HeadMixer,
    *,
    dropout: float = 0.0,
    chunk: int = 0,
    sync: bool = False,
) -> Tensor:
    """Compute re-attention. (B, H, N, K) three times -> (B, H, N, K), in the type of v.

    Output, gradients and running statistics are those of the formula up to rounding; only the dropout masks
    are drawn in another order. The backward pass needs q, k, v and the output, and no map. The function can
    be differentiated once.

    It computes in float32 at least, whatever autocast says: the maps hug 1/N, and the norm would amplify the
    rounding of half precision (docs/decisions/0004-half-precision.md).

    Args:
        q, k, v: (B, H, N, K).
        mixer: how heads are mixed. A norm of another kind than HeadMixer names is called as a module, on maps
            that are kept. So is Centring under dropout, because the mean of a row is not known then.
        dropout: probability of dropping an entry of the softmax maps, before mixing; 0 outside training.
        chunk: rows of maps (queries, counted over images) worked on at a time; 0: chosen from the sizes.
        sync: whether BatchNorm takes its statistics from the batches of all ranks, which must be of one size.

    Raises:
        ValueError: BatchNorm in training has a single value per head.
        RuntimeError: a second derivative is asked for.
    """
    norm = mixer.norm
    known = isinstance(norm, Centring) and not dropout
    if norm is not None and not known and type(norm) not in (nn.BatchNorm2d, nn.LayerNorm):
        return plain_reattention(q, k, v, mixer, dropout=dropout)
    mode = _mode(norm, sync)
    count = q.shape[0] * q.shape[2] ** 2 * (distributed.get_world_size() if mode == "ranks" else 1)
    if mode in ("batch", "ranks") and count <= 1:
        raise ValueError(f"BatchNorm needs more than one value per head to train, got q {tuple(q.shape)}")
    theta, bias, weight, shift = _folded(mixer, mode, torch.promote_types(v.dtype, torch.float32))
    if isinstance(norm, Centring):
        weight, shift = centred_affine(mixer, q.shape[2], theta.dtype)
    eps = getattr(norm, "eps", 0.0)
    seed = torch.randint(2**62, (), device="cpu") if dropout else None
    out, _, mean, var = call_operator(q, k, v, theta, bias, weight, shift, seed, mode, eps, dropout, chunk)
    if mode in ("batch", "ranks") and isinstance(norm, nn.BatchNorm2d) and norm.training:
        with torch.no_grad():
            _update_running_statistics(norm, mean if bias is None else mean + bias, var, count)
    return out


def _folded(mixer: HeadMixer, mode: str, full: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return theta (H, H), bias, weight and shift (H,) of the operator, in the type to compute in.

    The scale becomes part of weight and shift. Where the statistics of a norm are known beforehand, they and
    the bias do as well, so that the maps need only be mixed.
    """
    norm, scale = mixer.norm, mixer.scale
    theta, bias = mixer.theta.to(full), None if mixer.bias is None else mixer.bias.to(full)
    weight, shift = _affine(norm, theta)
    if scale != 1.0:
        weight, shift = scale * weight, scale * shift
    if mode == "none":
        if (
            isinstance(norm, nn.BatchNorm2d)
            and norm.running_mean is not None
            and norm.running_var is not None
        ):
            weight = weight * (norm.running_var.to(full) + norm.eps).rsqrt()
            shift = shift - weight * norm.running_mean.to(full)
        if bias is not None:
            shift, bias = shift + weight * bias, None
    return theta, bias, weight, shift


def centred_affine(mixer: HeadMixer, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weight and shift (H,) with weight Theta^T A + shift = scale * Centring(Theta^T A + bias).

    Rows of the softmax maps A sum to 1, so the mean of a row of Theta^T A is Theta's column sum / N.
    """
    assert isinstance(mixer.norm, Centring)
    own, common = (factor.to(dtype) * mixer.scale for factor in mixer.norm.factors())
    mean = mixer.theta.to(dtype).sum(0) / tokens
    shift = (common - own) * mean
    return own, shift if mixer.bias is None else shift + common * mixer.bias.to(dtype)


def _mode(norm: nn.Module | None, sync: bool) -> str:
    """Return what the maps are normalised over, a key of `norm.NORMS`.

    'batch' is this process's batch, 'ranks' the batches of all ranks, 'layer' the heads at each query and
    key. 'none' is also a norm whose statistics are known before the maps: BatchNorm's running ones, and the
    mean of a row.
    """
    if isinstance(norm, nn.LayerNorm):
        return "layer"
    if isinstance(norm, Centring):
        return "none"
    has_running = norm is not None and norm.running_mean is not None and norm.running_var is not None
    if norm is None or (has_running and not norm.training):
        return "none"
    return "ranks" if sync and norm.training and distributed.is_initialized() else "batch"


def _affine(norm: nn.Module | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the norm's weight and bias, (H,) each. They are 1 and 0 where it has none."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    return (
        like.new_ones(len(like)) if weight is None else weight.to(like.dtype),
        like.new_zeros(len(like)) if bias is None else bias.to(like.dtype),
    )


def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Update the running mean and unbiased variance as nn.BatchNorm2d does.

    Without a momentum they are the means over all batches so far.
    """
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    unbiased = var * (count / (count - 1))
    if norm.momentum is not None and mean.is_cuda:  # two launches instead of eight
        new = [mean.to(norm.running_mean.dtype), unbiased.to(norm.running_var.dtype)]
        torch._foreach_lerp_([norm.running_mean, norm.running_var], new, norm.momentum)
        return
    rate = 1.0 / norm.num_batches_tracked.double() if norm.momentum is None else norm.momentum
    for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        running.copy_((1 - rate) * running + rate * new)
