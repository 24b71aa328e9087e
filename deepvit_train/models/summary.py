"""The size of a model: parameters, and operations an image."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """The number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_flops(model: nn.Module, image_size: int, channels: int = 3) -> int:
    """Floating-point operations of one image's forward pass: two a multiply-add of a matrix product."""
    parameter, was_training = next(model.parameters()), model.training
    image = torch.zeros(1, channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    # The counter does not know the CPU's fused attention kernel; the plain one does the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    model.train(was_training)
    return counter.get_total_flops()
