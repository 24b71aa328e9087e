"""Compute differential attention: the difference of two softmax maps, so that what both attend to cancels.

Shapes: B batch, N tokens, H heads, K head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit_train.config.preset import Architecture
from deepvit_train.error import ConfigError
from deepvit_train.models.attention import Attention, form
from deepvit_train.models.reattention import softmax_maps

LAMBDAS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")


@form("differential")
class DifferentialAttention(Attention):
    """Each head subtracts a second softmax map from its first: RMSNorm((A1 - lambda A2) V) (1 - lambda_init).

    A head's queries and keys are halved: one half makes A1, the other A2. Every block learns its lambda, as
    exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init, four vectors of K/2.

    Source: Ye et al., arXiv 2410.05258, section 2.1. Names are those of timm's DiffAttention.

    Raises ConfigError for heads of an odd width.
    """

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__(architecture, index)
        if self.head_dim % 2:
            raise ConfigError(
                f"attn=differential: halves its heads, which are {self.head_dim} wide; "
                f"nearest: model.head_dim={self.head_dim + 1}"
            )
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * index)
        for name in LAMBDAS:
            setattr(self, name, nn.Parameter(torch.empty(self.head_dim // 2)))
            nn.init.normal_(getattr(self, name), std=0.1)
        self.sub_norm = nn.RMSNorm(self.head_dim, eps=1e-5)

    def _lambda(self) -> Tensor:
        """Return how much of the second map is subtracted, a scalar."""
        q1, k1, q2, k2 = (getattr(self, name) for name in LAMBDAS)
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lambda_init

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_dropout if self.training else 0.0
        first, second = (
            F.scaled_dot_product_attention(*half, v, dropout_p=dropout) for half in _halves(q, k)
        )
        return first - self._lambda().to(v.dtype) * second

    def forward_with_maps(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same as `forward`: (output, A1, A1 - lambda A2), the maps (B, H, N, N).

        Maps that are `given` take the place of A1.
        """
        q, k, v = self._heads(x)
        with torch.autocast(x.device.type, enabled=False):
            full = torch.promote_types(v.dtype, torch.float32)
            first, second = (softmax_maps(*half) for half in _halves(q.to(full), k.to(full)))
            first = first if given is None else given
            after = self._drop(first) - self._lambda() * self._drop(second)
            out = (after @ v.to(full)).to(v.dtype)
        return self._output(out), first, after

    def mixing_parameters(self) -> list[nn.Parameter]:
        return [getattr(self, name) for name in LAMBDAS]

    def _output(self, out: Tensor) -> Tensor:
        full = torch.promote_types(out.dtype, torch.float32)
        return super()._output((self.sub_norm(out.to(full)) * (1 - self.lambda_init)).to(out.dtype))


def _halves(q: Tensor, k: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the queries and keys of A1, and those of A2."""
    return list(zip(q.chunk(2, dim=-1), k.chunk(2, dim=-1), strict=True))
