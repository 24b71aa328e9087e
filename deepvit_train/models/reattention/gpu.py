"""Re-attention on a GPU: what `kernel.py` computes, by Triton kernels on chunks of images.

    forward     maps -> mix -> affine -> values
    backward    sums -> coefficients -> remap -> unmix -> gradients -> totals

Only q, k, v, out and a number per row of the maps are kept. The maps of a chunk lie in device memory in the
type of q, never those of a larger batch. Launches are few: the host needs as long for a small kernel as for a
large one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepvit_train.models.reattention.gpu_call import Call
from deepvit_train.models.reattention.norm import Mixing

TYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_HEADS = 32
MOST_HEAD_DIM = 128


def covers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these inputs. Theta, bias, weight and shift have to be float32."""
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in TYPES
        and q.shape[1] <= MOST_HEADS
        and q.shape[3] <= MOST_HEAD_DIM
        and 0 not in q.shape
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, mixing: Mixing, seed: Tensor | None, dropout: float, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `kernel.forward`. rows: of the maps of a chunk, counted over images; 0: chosen from the sizes."""
    call = Call(q, mixing, seed, dropout, rows)
    plan = call.plan
    q, k, v = (call.rows_whole(each) for each in (q, k, v))
    maps, log_sums = call.new_maps(), call.new(plan.batch, plan.heads, plan.tokens)
    mean, var = (call.new(plan.heads if plan.over_batch else 0) for _ in range(2))
    affine = call.new(2, plan.padded_heads)
    parts = call.new(plan.batch, plan.mix_programs, 2, plan.padded_heads)
    # BatchNorm's slope is known after the last chunk. If that is not the only one, it is put in at the end.
    late = plan.over_batch and len(plan.chunks) > 1
    out = call.new(plan.batch, plan.tokens, plan.heads, plan.head_dim, dtype=None if late else v.dtype)
    if not plan.over_batch:
        call.find_affine(parts, affine, mean, var)
    for chunk in plan.chunks:
        call.make_maps(_of(q, chunk), _of(k, chunk), maps, _of(log_sums, chunk))
        call.mix(maps, _of(parts, chunk), chunk.start)
        if plan.over_batch and chunk.stop == plan.batch:
            call.find_affine(parts, affine, mean, var)
        call.apply_maps(maps, _of(v, chunk), affine, _of(out, chunk), final=not late)
    if late:
        slope, offset = affine[:, : plan.heads, None]
        out = (out * slope + v.float().sum(2)[:, None] * offset).to(v.dtype)
    return call.narrowed(out).transpose(1, 2), log_sums, mean, var


def backward(
    dout: Tensor,
    out: Tensor,
    log_sums: Tensor,
    statistics: tuple[Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    mixing: Mixing,
    dropped: tuple[Tensor | None, float],
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `kernel.backward`: the gradients of q, k, v, theta, bias, weight and shift.

    statistics: mean and var of `forward`; inputs: q, k, v; dropped: seed and dropout.
    """
    call = Call(inputs[0], mixing, *dropped, rows)
    plan = call.plan
    inputs_and_results = *inputs, dout.to(out.dtype), out
    q, k, v, dout, out = (call.rows_whole(each) for each in inputs_and_results)
    v_sum, dout_sum = (call.new(plan.batch, plan.heads, plan.head_dim) for _ in range(2))
    coefficients = call.find_coefficients(v, dout, out, v_sum, dout_sum, statistics)
    maps, grads = call.new_maps(), call.new_maps()
    shape = plan.batch, plan.heads, plan.tokens, plan.head_dim
    gradients = [call.new(*shape, dtype=plan.dtype) for _ in range(3)]
    products = call.new(plan.batch, plan.unmix_programs, 2, plan.padded_heads, plan.padded_heads)
    sums = call.new(plan.batch, plan.unmix_programs, plan.padded_heads)
    dweight = call.new(plan.batch, plan.tiles(plan.gradients), plan.padded_heads)
    for chunk in plan.chunks:
        inputs_of_chunk = [_of(each, chunk) for each in (q, k, v, dout)]
        call.remap(inputs_of_chunk, _of(log_sums, chunk), _of(v_sum, chunk), maps, grads)
        call.unmix(maps, grads, coefficients, _of(products, chunk), _of(sums, chunk), chunk.start)
        targets = [_of(each, chunk) for each in (*gradients, dweight)]
        call.find_gradients(maps, grads, inputs_of_chunk, _of(dout_sum, chunk), coefficients, targets)
    dq, dk, dv = (call.narrowed(each) for each in gradients)
    return dq, dk, dv, *call.add_up(products, sums, dweight, coefficients)


def _of(tensor: Tensor, chunk: slice) -> Tensor:
    """The images of a chunk; no view is made where that is all."""
    return tensor if chunk.start == 0 and chunk.stop == len(tensor) else tensor[chunk]
