"""Compute re-attention and its gradient in loops over chunks of maps, so that memory holds one chunk.

    A = drop(softmax(q k^T / sqrt(K))),  M = Theta^T A + bias,  X = norm(M),  out = (weight X + shift) v

The backward pass makes each chunk's maps again, from q, k and the sums of the softmax's rows. `shift` is not
added to the maps: the sum of v over tokens is what a map of ones would give.

Shapes: B batch, N tokens, P padded tokens, H heads, K head_dim; in a chunk C images and R rows (queries).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepvit_train.models.reattention.chunk import Chunks, product
from deepvit_train.models.reattention.norm import NORMS, Mixing, per_head


def forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return out (B, H, N, K), log_sums, mean and var. The backward pass needs them all.

    log_sums (B, H, N) is the log2 of the sum under each query's softmax. mean and var (H,) are those of
    M - bias for the norms 'batch' and 'ranks'; else they are empty tensors.
    """
    norm = NORMS[mixing.norm](mixing, chunks)
    mixer = norm.theta.T.contiguous()
    queries, keys, values = chunks.queries(q), chunks.keys(k), chunks.cast(v)
    out, log_sums = token_major(values), values.new_empty(q.shape[:3])
    for images, rows in chunks:
        maps, x = chunks.buffers(2, images, rows)
        log_sums[images, :, rows] = chunks.first_maps(queries[images, :, rows], keys[images], maps)
        if chunks.generator:
            maps.mul_(chunks.draw_mask(x))
        _mix(mixer, maps, x)
        norm.observe(x, spare=maps)
        out[images, :, rows] = chunks.unpad(x) @ values[images]
    slope, shift, mean, var = norm.finish()
    torch.addcmul(values.sum(2, keepdim=True) * per_head(shift), out, per_head(slope), out=out)
    return out.to(v.dtype), log_sums, mean, var


def backward(
    dout: Tensor,
    results: tuple[Tensor, Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    mixing: Mixing,
    chunks: Chunks,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, theta, bias, weight and shift.

    A bias that has no effect gets a gradient of 0.

    Args:
        dout: (B, H, N, K), the gradient of out.
        results: what `forward` returned.
        inputs: q, k and v, as `forward` had them.
        mixing, chunks: as `forward` had them; `chunks` is a new object with the same seed.
    """
    (out, log_sums, mean, var), (q, k, v) = results, inputs
    norm = NORMS[mixing.norm](mixing, chunks)
    queries, keys = chunks.queries(q, log_sums), chunks.keys(k)
    q_, k_, v_, dout_ = (chunks.cast(each) for each in (q, k, v, dout))
    values = chunks.pad(norm.prepare_backward((mean, var), dout_, out, v_)).mT
    weighted = dout_ * per_head(mixing.weight)
    mixer, theta = norm.theta.T.contiguous(), norm.theta.contiguous()
    dq, dk, dv = torch.empty_like(q_), torch.zeros_like(k_), torch.zeros_like(v_)
    for images, rows in chunks:
        maps, x, dx, spare, *drop = chunks.buffers(6 if chunks.generator else 4, images, rows)
        chunks.same_maps(queries[images, :, rows], keys[images], maps)
        dropped = torch.mul(maps, chunks.draw_mask(drop[0]), out=drop[1]) if drop else maps
        _mix(mixer, dropped, x)
        norm.normalise(x, spare)
        _add_product(dv[images], chunks.unpad(x).mT, dout_[images, :, rows])
        product(weighted[images, :, rows], values[images], dx)
        norm.differentiate(dx, x, spare)
        norm.collect(dx, dropped)
        dmaps = _mix(theta, dx, x)
        if drop:
            dmaps.mul_(drop[0])
        torch.ops.aten._softmax_backward_data.out(dmaps, maps, -1, maps.dtype, grad_input=dmaps)
        dq[images, :, rows] = chunks.unpad(dmaps) @ k_[images]
        _add_product(dk[images], chunks.unpad(dmaps).mT, q_[images, :, rows])
    dtheta, dbias = norm.gradients()
    dweight, dout_sum = torch.sum(v_ * dv, (0, 2, 3)), dout_.sum(2, keepdim=True)
    dshift = (v_.sum(2, keepdim=True) * dout_sum).sum((0, 2, 3))
    torch.addcmul(dout_sum * per_head(mixing.shift), dv, per_head(mixing.weight), out=dv)
    dq, dk = dq.mul_(chunks.scale), dk.mul_(chunks.scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dtheta, dbias, dweight, dshift


def token_major(like: Tensor) -> Tensor:
    """Return an uninitialised tensor (B, H, N, K) that lies in memory as (B, N, H, K).

    The projection after attention reads it in that order without a copy.
    """
    b, h, n, k = like.shape
    return like.new_empty((b, n, h, k)).transpose(1, 2)


def _mix(theta: Tensor, maps: Tensor, out: Tensor) -> Tensor:
    """Compute out[g] = sum_h theta[g, h] maps[h]."""
    torch.bmm(theta.expand(len(maps), -1, -1), maps.flatten(2), out=out.flatten(2))
    return out


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.flatten(0, 1).baddbmm_(left.flatten(0, 1), right.flatten(0, 1))
