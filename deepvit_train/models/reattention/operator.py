"""Re-attention as one operator of torch: autograd, torch.compile, export and the FLOP counter know it.

Shapes: B batch, N tokens, H heads, K head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepvit_train.models.reattention import kernel
from deepvit_train.models.reattention.chunk import Chunks
from deepvit_train.models.reattention.kernel import token_major
from deepvit_train.models.reattention.norm import Mixing


@torch.library.custom_op("deepvit_train::reattention", mutates_args=())
def operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    norm: str,
    eps: float,
    dropout: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `kernel.forward` returns. Arguments as in `Mixing` and `Chunks`."""
    mixing = Mixing(theta, bias, weight, shift, norm, eps)
    with torch.autocast(q.device.type, enabled=False):
        return kernel.forward(q, k, v, mixing, Chunks(q, theta.dtype, seed, dropout, chunk))


@torch.library.custom_op("deepvit_train::reattention_backward", mutates_args=())
def operator_backward(
    dout: Tensor,
    out: Tensor,
    log_sums: Tensor,
    mean: Tensor,
    var: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    seed: Tensor | None,
    norm: str,
    eps: float,
    dropout: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, theta, bias, weight and shift."""
    mixing = Mixing(theta, bias, weight, shift, norm, eps)
    with torch.autocast(q.device.type, enabled=False):
        chunks = Chunks(q, theta.dtype, seed, dropout, chunk)
        return kernel.backward(dout, out, log_sums, mean, var, q, k, v, mixing, chunks)


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    statistics = len(theta) if "batch" in settings or "ranks" in settings else 0
    log_sums = theta.new_empty(q.shape[:3])
    return token_major(v), log_sums, theta.new_empty(statistics), theta.new_empty(statistics)


@operator_backward.register_fake
def _(
    dout: Tensor,
    out: Tensor,
    log_sums: Tensor,
    mean: Tensor,
    var: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    *settings: Any,
) -> tuple[Tensor, ...]:
    small = [theta.new_empty(len(theta)) for _ in range(3)]
    return *(each.new_empty(each.shape) for each in (q, k, v)), torch.empty_like(theta), *small


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, dout: Tensor, *of_statistics: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: gradient checkpointing allows no second look
    dq, dk, dv, dtheta, dbias, dweight, dshift = operator_backward(dout, *saved, *ctx.settings)
    return dq, dk, dv, dtheta, None if saved[8] is None else dbias, dweight, dshift, *[None] * 5


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "re-attention is differentiable once; for second derivatives use "
        "deepvit_train.models.reattention.formula.plain_reattention"
    )


operator.register_autograd(_differentiate, setup_context=_save)
operator_backward.register_autograd(_refuse)


@register_flop_formula(torch.ops.deepvit_train.reattention)
def _(q: Any, *inputs: Any, out_val: Any = None, **kwargs: Any) -> int:
    """The products q k^T, Theta^T A and (map) v; two operations a multiply-add."""
    batch, heads, tokens, head_dim = q
    return 2 * batch * heads * tokens**2 * (2 * head_dim + heads)


@register_flop_formula(torch.ops.deepvit_train.reattention_backward)
def _(dout: Any, *inputs: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Five products with head_dim and three with heads, q k^T and Theta^T A made again among them."""
    batch, heads, tokens, head_dim = dout
    return 2 * batch * heads * tokens**2 * (5 * head_dim + 3 * heads)
