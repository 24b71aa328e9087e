"""The averaged weights of a schedule-free optimizer (Defazio et al., arXiv 2405.15682), as a second model.

The optimizer trains at y, between the average x and the sequence z of plain steps: y = (1 - beta) z + beta x.
So x = y + (1 - 1 / beta) (z - y). The model holds y, and is what training goes on with; x is evaluated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from deepvit_train.models import DeepViT


class ScheduleFreeAverage:
    """The model at x, in the place of averaged weights. It is computed anew where it is asked for.

    Attributes:
        module: the model at x, once `refresh` was called. It is never trained.
    """

    def __init__(self, model: DeepViT) -> None:
        self.module: DeepViT = copy.deepcopy(model).eval().requires_grad_(False)

    def update(self, model: nn.Module, step: int) -> None:
        """Do nothing: the optimizer keeps the average."""

    @torch.no_grad()
    def refresh(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Compute the weights at x. Buffers, such as running statistics, are those of the model."""
        own: dict[str, Any] = dict(self.module.named_parameters())
        names = {parameter: name for name, parameter in model.named_parameters()}
        for buffer, value in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(value)
        for group in optimizer.param_groups:
            beta = group["betas"][0] if "betas" in group else group["momentum"]
            for parameter in group["params"]:
                z = optimizer.state[parameter].get("z", parameter)
                own[names[parameter]].copy_(torch.lerp(parameter, z, 1 - 1 / beta))
