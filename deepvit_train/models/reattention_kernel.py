"""Re-attention without its maps in memory: forward and backward as loops over chunks of maps.

    A = drop(softmax(q k^T / sqrt(K))),  M = Theta^T A + bias,  X = norm(M),  out = (weight X + shift) v

Only q, k, v and out are kept for the backward pass, which makes each chunk's maps again. What keeps it cheap:

- `shift` never meets the maps: the sum of v over tokens stands for (map of ones) v.
- 'layer' (over heads, at each query and key): Theta and bias arrive centred over the heads they make, so that
  only the variance is left to compute, and the backward pass has no term for the mean.
- 'batch' (over images, queries and keys): A has the mean 1/N, so M is centred as it is made. Its deviation is
  known after the last chunk only, but scales whole heads, and so divides out at the end. The backward pass
  needs mean(dX X) before its first chunk, and has it from out: sum_ij dX_ij X_ij = sum_i dout_i (X v)_i.
- 'none': X = M. BatchNorm by its running statistics is this too, with its own weight and shift.

Shapes: B batch, N tokens, H heads, K head_dim; in a chunk C images and R rows (queries).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deepvit_train.models.reattention_chunk import Chunks, product


@dataclass(frozen=True)
class Mixing:
    """What happens to the maps; tensors are of the type to compute in.

    theta: (H, H), rows are input heads; bias (or None), weight, shift: (H,).
    norm: 'layer', 'batch' or 'none'.
    """

    theta: Tensor
    bias: Tensor | None
    weight: Tensor
    shift: Tensor
    norm: str
    eps: float


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (B, H, N, K), and what the backward pass wants to know besides.

    That is, for each query the log2 of its softmax's sum, (B, H, N); and with 'batch' the mean and variance
    of M, (H,) each, else two empty tensors.
    """
    theta, batch = mixing.theta, mixing.norm == "batch"
    out = token_major(v, theta.dtype)
    log_sums = theta.new_empty(q.shape[:3])
    center = theta.sum(0) / chunks.tokens
    center_maps = chunks.over_keys(center)
    sums = torch.zeros(2, len(theta), dtype=torch.float64, device=q.device)  # of M - center and its square
    for images in chunks.images:
        q_, k_, v_ = (chunks.load(images, each) for each in (q, k, v))
        queries, keys = chunks.queries(q_), chunks.keys(k_)
        for rows in chunks.rows:
            maps, x = chunks.buffers(2, images, rows)
            log_sums[images, :, rows] = chunks.first_maps(queries[:, :, rows], keys, maps)[..., 0]
            if chunks.generator:
                maps.mul_(chunks.draw_mask(x))
            _mix(theta, maps, x)
            if mixing.norm == "layer":
                _normalise_heads(x, mixing, chunks, maps)
            elif batch:
                _add_sums(x.sub_(center_maps), sums, with_mean=chunks.generator is not None)
            out[images, :, rows] = chunks.unpadded(x) @ v_
    slope, shift = mixing.weight, mixing.shift
    mean, var = theta.new_empty(0), theta.new_empty(0)
    if batch:
        rest, square = (sums / (len(q) * chunks.tokens**2)).to(theta.dtype)
        mean, var = center + rest, square - rest**2
        slope = slope * (var + mixing.eps).rsqrt()
        shift = shift - slope * rest
    values = v.sum(2, keepdim=True, dtype=theta.dtype)
    torch.addcmul(values * _per_head(shift), out, _per_head(slope), out=out)
    return out.to(v.dtype), log_sums, mean, var


def backward(
    dout: Tensor,
    out: Tensor,
    log_sums: Tensor,
    mean: Tensor,
    var: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: Mixing,
    chunks: Chunks,
) -> Gradients:
    """The gradients of q, k, v, theta, bias, weight and shift from that of out.

    out, log_sums, mean and var are what `forward` returned. Without a bias its gradient is 0.
    """
    theta, weight, batch = mixing.theta, mixing.weight, mixing.norm == "batch"
    dq, dk, dv = (theta.new_zeros(q.shape) for _ in range(3))
    dtheta, dbias = torch.zeros_like(theta), torch.zeros_like(weight)
    dweight, dshift = torch.zeros_like(weight), torch.zeros_like(weight)
    dx_mean = dx_x_mean = deviation = center = inverse = weight  # what the norm needs of these is set below
    is_dropping = chunks.generator is not None
    if batch:
        deviation = (var + mixing.eps).sqrt()
        theta, center = theta / deviation, chunks.over_keys(mean / deviation)
        dx_mean, dx_x_mean = _batch_means(dout, out, v, mixing, chunks.tokens)
        dx_mean = chunks.over_keys(dx_mean)
    for images in chunks.images:
        q_, k_, v_, dout_ = (chunks.load(images, each) for each in (q, k, v, dout))
        queries, keys = chunks.queries(q_, log_sums[images]), chunks.keys(k_)
        scaled = dout_ * _per_head(weight)
        # Rows of maps sum to 1 unless dropped: then v less its mean leaves out what the norm takes away.
        values = chunks.pad(v_ if is_dropping or not batch else v_ - v_.mean(2, keepdim=True)).mT
        for rows in chunks.rows:
            maps, x, dx, spare, *drop = chunks.buffers(6 if is_dropping else 4, images, rows)
            chunks.again(queries[:, :, rows], keys, maps)
            mixed = torch.mul(maps, chunks.draw_mask(drop[0]), out=drop[1]) if drop else maps
            _mix(theta, mixed, x)
            if mixing.norm == "layer":
                inverse = _normalise_heads(x, mixing, chunks, dx)
            elif batch:
                x.sub_(center)
            _add_product(dv[images], chunks.unpadded(x).mT, dout_[:, :, rows])
            product(scaled[:, :, rows], values, dx)
            if mixing.norm == "layer":
                along = torch.mul(dx, x, out=spare).mean(1, keepdim=True)
                dx.addcmul_(x, along, value=-1).mul_(inverse)
            elif batch:
                dx.addcmul_(x, _per_head(dx_x_mean), value=-1)
                if drop:
                    dx.sub_(dx_mean)
            dtheta += torch.bmm(mixed.flatten(2), dx.flatten(2).mT).sum(0)
            if mixing.bias is not None:
                dbias += dx.sum((0, 2, 3))
            _mix(theta.T, dx, x)
            if drop:
                x.mul_(drop[0])
            torch.ops.aten._softmax_backward_data.out(x, maps, -1, maps.dtype, grad_input=x)
            dq[images, :, rows] = (chunks.unpadded(x) @ k_).mul_(chunks.scale)
            _add_product(dk[images], chunks.unpadded(x).mT, q_[:, :, rows])
        dweight += torch.sum(v_ * dv[images], (0, 2, 3))
        dout_sum = dout_.sum(2, keepdim=True)
        dshift += (v_.sum(2, keepdim=True) * dout_sum).sum((0, 2, 3))
        dv[images].mul_(_per_head(weight)).add_(dout_sum * _per_head(mixing.shift))
    if batch:
        dtheta /= deviation
    dk *= chunks.scale
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtheta, dbias, dweight, dshift


def token_major(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised (B, H, N, K) in the memory order (B, N, H, K), as the next projection reads it."""
    b, h, n, k = like.shape
    return like.new_empty((b, n, h, k), dtype=dtype).transpose(1, 2)


def _per_head(value: Tensor) -> Tensor:
    return value[:, None, None]


def _mix(theta: Tensor, maps: Tensor, out: Tensor) -> None:
    """out[g] = sum_h maps[h] theta[h, g]."""
    mixer = theta.T.contiguous().expand(len(maps), -1, -1)
    torch.bmm(mixer, maps.flatten(2), out=out.flatten(2))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))


def _normalise_heads(x: Tensor, mixing: Mixing, chunks: Chunks, spare: Tensor) -> Tensor:
    """Divide by the deviation over heads, in place; returns what was multiplied by, (C, 1, R, P)."""
    if mixing.bias is not None:
        x.add_(chunks.over_keys(mixing.bias))
    inverse = torch.mul(x, x, out=spare).mean(1, keepdim=True).add_(mixing.eps).rsqrt_()
    x.mul_(inverse)
    return inverse


def _add_sums(x: Tensor, sums: Tensor, with_mean: bool) -> None:
    """Add x and x^2 to the two sums over images, queries and keys."""
    sums[1] += torch.linalg.vector_norm(x.flatten(2), dim=2).double().square().sum(0)
    if with_mean:  # without dropout it is 0
        sums[0] += x.sum((2, 3)).sum(0)


def _batch_means(dout: Tensor, out: Tensor, v: Tensor, mixing: Mixing, tokens: int) -> tuple[Tensor, Tensor]:
    """The means over images, queries and keys of dX and of dX X, (H,) each."""
    full, count = mixing.theta.dtype, len(v) * tokens**2
    v_sum, dout = v.sum(2, dtype=full), dout.to(full)
    both = (v_sum * dout.sum(2)).sum((0, 2))
    along = (dout * out).sum((0, 2, 3)) - mixing.shift * both
    return mixing.weight * both / count, along / count
