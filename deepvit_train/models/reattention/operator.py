"""Re-attention as one operator of torch: autograd, torch.compile, export and the FLOP counter know it.

It is registered with the dispatcher itself, and not by torch.library.custom_op, whose wrappers take the host
longer than a GPU takes for a block's attention (docs/records).

Shapes: B batch, N tokens, H heads, K head_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from deepvit_train.console import amount
from deepvit_train.models.reattention import kernel
from deepvit_train.models.reattention.chunk import Chunks
from deepvit_train.models.reattention.kernel import token_major
from deepvit_train.models.reattention.norm import Mixing

_MIXING = (
    "Tensor theta, Tensor? bias, Tensor weight, Tensor shift, Tensor? seed, "
    "str norm, float eps, float dropout, int chunk"
)
_library = torch.library.Library("deepvit_train", "DEF")
_library.define(
    f"reattention(Tensor q, Tensor k, Tensor v, {_MIXING}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "reattention_backward(Tensor dout, Tensor out, Tensor log_sums, Tensor mean, Tensor var, "
    f"Tensor q, Tensor k, Tensor v, {_MIXING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# What `kernel.forward` returns. Arguments after v are those of `Mixing` and `Chunks`.
operator = torch.ops.deepvit_train.reattention.default
# The gradients of q, k, v, theta, bias, weight and shift.
operator_backward = torch.ops.deepvit_train.reattention_backward.default


def _forward(
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
    mixing = Mixing(theta, bias, weight, shift, norm, eps)
    if (gpu := gpu_kernels(q, k, v)) is not None:
        return gpu.forward(q, k, v, mixing, seed, dropout, chunk)
    with full_precision(q.device):
        return kernel.forward(q, k, v, mixing, Chunks(q, theta.dtype, seed, dropout, chunk))


def _backward(
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
    mixing = Mixing(theta, bias, weight, shift, norm, eps)
    if (gpu := gpu_kernels(q, k, v)) is not None:
        return gpu.backward(dout, out, log_sums, (mean, var), (q, k, v), mixing, (seed, dropout), chunk)
    with full_precision(q.device):
        chunks = Chunks(q, theta.dtype, seed, dropout, chunk)
        return kernel.backward(dout, (out, log_sums, mean, var), (q, k, v), mixing, chunks)


_library.impl("reattention", _forward, "CompositeExplicitAutograd")
_library.impl("reattention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("deepvit_train::reattention", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    statistics = len(theta) if "batch" in settings or "ranks" in settings else 0
    log_sums = theta.new_empty(q.shape[:3])
    return token_major(v), log_sums, theta.new_empty(statistics), theta.new_empty(statistics)


@torch.library.register_fake("deepvit_train::reattention_backward", lib=_library)
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


class _Differentiable(torch.autograd.Function):
    """The operator with its gradient. Saved are its results, its tensors, and nothing of the maps."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, log_sums, mean, var = operator(*inputs)
        ctx.mark_non_differentiable(log_sums, mean, var)
        ctx.save_for_backward(out, log_sums, mean, var, *inputs[:8])
        ctx.settings = inputs[8:]
        ctx.set_materialize_grads(False)
        return out, log_sums, mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dout = gradients[0]
        if dout is None:
            return (None,) * 12
        saved = ctx.saved_tensors  # once: gradient checkpointing allows no second look
        gradient = operator_backward if torch.compiler.is_compiling() else _apply_backward
        dq, dk, dv, dtheta, dbias, dweight, dshift = gradient(dout, *saved, *ctx.settings)
        return dq, dk, dv, dtheta, None if saved[8] is None else dbias, dweight, dshift, *[None] * 5


class _DifferentiableOnce(torch.autograd.Function):
    """The gradient, which has none of its own."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return operator_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "re-attention is differentiable once; for second derivatives use "
            "deepvit_train.models.reattention.plain_reattention"
        )


def _with_gradient(function: type[torch.autograd.Function], below: Any) -> Any:
    """The function for tensors that autograd may follow.

    Under forward-mode differentiation the function is applied too, which raises, because it has no such rule.
    """

    def call(*inputs: Any) -> Any:
        follows = torch.is_grad_enabled() and any(
            isinstance(each, Tensor) and each.requires_grad for each in inputs
        )
        if follows or forward_ad._current_level >= 0:
            return function.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return below(*inputs)

    return call


_apply = _with_gradient(_Differentiable, operator)
_apply_backward = _with_gradient(_DifferentiableOnce, operator_backward)
_library.impl("reattention", _apply, "Autograd")
_library.impl("reattention_backward", _apply_backward, "Autograd")


def call_operator(*inputs: Any) -> tuple[Tensor, ...]:
    """The operator with its gradient, as a model calls it.

    Without a compiler the dispatcher would end in the same Python function, and going through it costs the
    host time in each block.
    """
    return operator(*inputs) if torch.compiler.is_compiling() else _apply(*inputs)


def gpu_kernels(q: Tensor, k: Tensor, v: Tensor) -> ModuleType | None:
    """The module `gpu` if its kernels take these inputs, else None, which is warned of once on a GPU."""
    if not q.is_cuda:
        return None
    try:
        # Only here: importing Triton takes a fraction of a second, and only CUDA builds of torch bring it.
        from deepvit_train.models.reattention import gpu
    except ImportError:
        _warn_of_slowness("Triton is not installed")
        return None
    if not gpu.covers(q, k, v):
        kind = str(q.dtype).removeprefix("torch.")
        _warn_of_slowness(f"no kernel takes {amount(q.shape[1], 'head')} of {q.shape[3]} in {kind}")
        return None
    return gpu


@cache
def _warn_of_slowness(reason: str) -> None:
    warnings.warn(f"re-attention runs without its GPU kernels, several times slower: {reason}", stacklevel=2)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 are those of float32: no autocast, and no TF32 if a caller allows it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            if device.type == "cuda":
                matmul.fp32_precision = before


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
