"""Count a model's parameters, and its operations for one image."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable and frozen."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, image_size: int, channels: int = 3) -> int:
    """Return the floating-point operations of the matrix products in one image's forward pass.

    A multiply-add counts as two.
    """
    parameter, was_training = next(model.parameters()), model.training
    image = torch.zeros(1, channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    # The counter does not know the CPU's fused attention kernel; the plain one computes the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(was_training)
    return counter.get_total_flops()
