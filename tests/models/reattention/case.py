"""Make inputs for re-attention's operator, and collect all that it computes, for its tests."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepvit_train.models.reattention import HeadMixer

NORMS = ["batch", "running", "layer", "none"]


def build_norm(kind: str, heads: int, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module | None:
    """A norm with weights, and running statistics, that leave no term out."""
    if kind == "none":
        return None
    norm = (nn.LayerNorm if kind == "layer" else nn.BatchNorm2d)(heads, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        if kind == "running":
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return norm.to(dtype).train(kind != "running")


def build_inputs(
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, theta and perhaps theta_bias, all requiring gradients."""
    shapes = [(batch, heads, tokens, head_dim)] * 3 + [(heads, heads)] + [(heads,)] * bias
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def arguments(
    inputs: list[Tensor], norm: nn.Module | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, HeadMixer]:
    """Return the positional arguments of `reattention` for the tensors of `build_inputs`."""
    q, k, v, theta, *bias = inputs
    return q, k, v, HeadMixer(theta, *(bias or [None]), norm, scale)


def everything(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    norm: nn.Module | None,
    scale: float = 1.0,
    **options: Any,
) -> list[Tensor]:
    """Return the output, all gradients, and the norm's buffers after the call."""
    norm = copy.deepcopy(norm)
    parameters = [] if norm is None else list(norm.parameters())
    out = function(*arguments(inputs, norm, scale), **options)
    direction = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out).cos()
    # In the layout in which it comes from the projection.
    direction = direction.transpose(1, 2).contiguous().transpose(1, 2)
    gradients = torch.autograd.grad(out, [*inputs, *parameters], direction)
    return [out.detach(), *gradients, *([] if norm is None else norm.buffers())]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=tolerance, atol=tolerance)
