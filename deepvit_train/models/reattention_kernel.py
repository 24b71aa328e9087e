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

from deepvit_train.models.reattention_chunk import Chunks


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


def forward(q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, K), and with 'batch' the mean and variance of M, (H,) each; else two empty tensors."""
    theta, batch = mixing.theta, mixing.norm == "batch"
    out = token_major(v, theta.dtype)
    center = theta.sum(0) / chunks.tokens
    sums = torch.zeros(2, len(theta), dtype=torch.float64, device=q.device)  # of M - center and its square
    for images in chunks.images:
        q_, k_, v_ = chunks.load(images, q, k, v)
        q_ = q_ * chunks.scale
        for rows in chunks.rows:
            maps, x, *mask = chunks.buffers(3 if chunks.generator else 2, images, rows)
            chunks.softmax_maps(q_[:, :, rows], k_, maps)
            if mask:
                maps.mul_(chunks.draw_mask(mask[0]))
            _mix(theta, maps, x)
            if mixing.norm == "layer":
                _normalise_heads(x, mixing)
            elif batch:
                _add_sums(x.sub_(_per_head(center)), sums, with_mean=bool(mask))
            out[images, :, rows] = torch.bmm(x.flatten(0, 1), v_.flatten(0, 1)).view(q_[:, :, rows].shape)
    slope, shift = mixing.weight, mixing.shift
    mean, var = theta.new_empty(0), theta.new_empty(0)
    if batch:
        rest, square = (sums / (len(q) * chunks.tokens**2)).to(theta.dtype)
        mean, var = center + rest, square - rest**2
        slope = slope * (var + mixing.eps).rsqrt()
        shift = shift - slope * rest
    out.mul_(_per_head(slope)).addcmul_(_per_head(shift), v.sum(2, keepdim=True, dtype=theta.dtype))
    return out.to(v.dtype), mean, var


def backward(
    dout: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    var: Tensor,
    mixing: Mixing,
    chunks: Chunks,
) -> Gradients:
    """The gradients of q, k, v, theta, bias, weight and shift from that of out.

    out, mean and var are what `forward` returned. Without a bias its gradient is 0.
    """
    theta, weight, batch = mixing.theta, mixing.weight, mixing.norm == "batch"
    dq, dk, dv = (token_major(each, theta.dtype) for each in (q, k, v))
    dtheta, dbias = torch.zeros_like(theta), torch.zeros_like(weight)
    dweight, dshift = torch.zeros_like(weight), torch.zeros_like(weight)
    dx_mean = dx_x_mean = deviation = center = inverse = weight  # what the norm needs of these is set below
    if batch:
        deviation = (var + mixing.eps).sqrt()
        theta, center = theta / deviation, mean / deviation
        dx_mean, dx_x_mean = _batch_means(dout, out, v, mixing, chunks.tokens)
    for images in chunks.images:
        q_, k_, v_, dout_ = chunks.load(images, q, k, v, dout)
        q_ = q_ * chunks.scale
        scaled = dout_ * _per_head(weight)
        dk_, dv_ = torch.zeros_like(k_), torch.zeros_like(v_)
        for rows in chunks.rows:
            maps, x, dx, *drop = chunks.buffers(5 if chunks.generator else 3, images, rows)
            chunks.softmax_maps(q_[:, :, rows], k_, maps)
            mixed = torch.mul(maps, chunks.draw_mask(drop[0]), out=drop[1]) if drop else maps
            _mix(theta, mixed, x)
            if mixing.norm == "layer":
                inverse = _normalise_heads(x, mixing)
            elif batch:
                x.sub_(_per_head(center))
            _add_product(dv_, x.mT, dout_[:, :, rows])
            _product(scaled[:, :, rows], v_.mT, dx)
            if mixing.norm == "layer":
                along = _dot_heads(dx, x).div_(chunks.heads)
                dx.addcmul_(x, along, value=-1).mul_(inverse)
            elif batch:
                dx.sub_(_per_head(dx_mean)).addcmul_(x, _per_head(dx_x_mean), value=-1)
            dtheta += torch.bmm(mixed.flatten(2), dx.flatten(2).mT).sum(0)
            if mixing.bias is not None:
                dbias += dx.sum((0, 2, 3))
            _mix(theta.T, dx, x)
            if drop:
                x.mul_(drop[0])
            torch.ops.aten._softmax_backward_data.out(x, maps, -1, maps.dtype, grad_input=x)
            dq[images, :, rows] = torch.matmul(x, k_).mul_(chunks.scale)
            _add_product(dk_, x.mT, q_[:, :, rows])
        dweight += torch.sum(v_ * dv_, (0, 2, 3))
        v_sum, dout_sum = v_.sum(2), dout_.sum(2)
        dshift += (v_sum * dout_sum).sum((0, 2))
        dv[images] = dv_.mul_(_per_head(weight)).add_((dout_sum * mixing.shift[:, None])[:, :, None])
        dk[images] = dk_
    if batch:
        dtheta /= deviation
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtheta, dbias, dweight, dshift


def token_major(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised (B, H, N, K) in the memory order (B, N, H, K), as the next projection reads it."""
    b, h, n, k = like.shape
    return like.new_empty((b, n, h, k), dtype=dtype).transpose(1, 2)


def _per_head(value: Tensor) -> Tensor:
    return value[:, None, None]


def _mix(theta: Tensor, maps: Tensor, out: Tensor) -> None:
    """out[g] = sum_h maps[h] theta[h, g]."""
    torch.bmm(theta.T.expand(len(maps), -1, -1), maps.flatten(2), out=out.flatten(2))


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))


def _dot_heads(left: Tensor, right: Tensor) -> Tensor:
    """Sum over heads of left * right: (C, H, R, N) -> (C, 1, R, N)."""
    total = left[:, :1] * right[:, :1]
    for head in range(1, left.shape[1]):
        total.addcmul_(left[:, head : head + 1], right[:, head : head + 1])
    return total


def _normalise_heads(x: Tensor, mixing: Mixing) -> Tensor:
    """Divide by the deviation over heads, in place; returns what was multiplied by, (C, 1, R, N)."""
    if mixing.bias is not None:
        x.add_(_per_head(mixing.bias))
    inverse = _dot_heads(x, x).div_(x.shape[1]).add_(mixing.eps).rsqrt_()
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
