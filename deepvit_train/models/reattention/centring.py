"""Part mixed maps into the mean of each row and what differs from it, and weigh the second by head.

Rows of a softmax map sum to 1, so the mean of a row of mixed maps M is known without M: the sum over heads of
Theta's column, divided by N. The operator therefore needs no map for these norms either.

Shapes: B batch, N tokens, H heads.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn


class Centring(nn.Module):
    """gain * (M - mean of its row), with a learned gain (H,) that starts at 1. (B, H, N, N) -> the same.

    Source: arXiv 2410.07799, which leaves out the gain, and 2306.17759.
    """

    gain: Tensor

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(heads))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors (H,) of what differs from the mean, and of the mean."""
        return self.gain, torch.zeros_like(self.gain)

    def forward(self, maps: Tensor) -> Tensor:
        mean = maps.mean(dim=-1, keepdim=True)
        own, common = (rearrange(factor.to(maps.dtype), "h -> h 1 1") for factor in self.factors())
        return own * (maps - mean) + common * mean


class AttentionScale(Centring):
    """mean + (1 + omega) * (M - mean of its row), with a learned omega (H,) that starts at 0.

    Source: AttnScale of arXiv 2203.05962, section 3.
    """

    omega: Tensor

    def __init__(self, heads: int) -> None:
        nn.Module.__init__(self)
        self.omega = nn.Parameter(torch.zeros(heads))

    def factors(self) -> tuple[Tensor, Tensor]:
        return 1 + self.omega, torch.ones_like(self.omega)
