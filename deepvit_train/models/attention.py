"""Multi-head attention, plain or with re-attention.

Shapes: B batch, N tokens, D dim, H heads, K head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from deepvit_train.models.reattention import reattention
from deepvit_train.schema.model import AttentionConfig, AttentionKind, ThetaInit, ThetaNorm


class Attention(nn.Module):
    """Plain multi-head softmax attention, through torch's fused kernels. (B, N, D) -> (B, N, D)."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, *, qkv_bias: bool, attn_dropout: float, dropout: float
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=qkv_bias)
        self.proj = nn.Linear(heads * head_dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.heads)
        out = self.attend(q, k, v)
        return self.proj_drop(self.proj(rearrange(out, "b h n k -> b n (h k)")))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the heads read: (B, H, N, K) three times -> (B, H, N, K)."""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_dropout if self.training else 0.0)


class ReAttention(Attention):
    """Attention whose maps are mixed across heads by a learned matrix, then normalised.

    Parameters besides those of Attention: `theta` (H, H), `theta_bias` (H,) in the paper's form, and `norm`.
    Source: arXiv 2103.11886, section 4.2; the initialisations are those of the authors' 1x1 convolution and
    of vit-pytorch.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        attn: AttentionConfig,
        qkv_bias: bool,
        attn_dropout: float,
        dropout: float,
    ) -> None:
        super().__init__(dim, heads, head_dim, qkv_bias=qkv_bias, attn_dropout=attn_dropout, dropout=dropout)
        self.output_scale = head_dim**-0.5 if attn.transform_scale else 1.0
        self.theta = nn.Parameter(torch.empty(heads, heads))
        self.theta_bias = nn.Parameter(torch.zeros(heads)) if attn.kind == AttentionKind.reattention else None
        self.norm = _build_norm(attn.norm, heads)
        self._init_theta(attn)

    def _init_theta(self, attn: AttentionConfig) -> None:
        if attn.theta_init == ThetaInit.identity:
            nn.init.eye_(self.theta)
        elif self.theta_bias is None:
            nn.init.normal_(self.theta)
        else:
            bound = self.theta.shape[0] ** -0.5
            nn.init.uniform_(self.theta, -bound, bound)
            nn.init.uniform_(self.theta_bias, -bound, bound)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_dropout if self.training else 0.0
        return reattention(
            q, k, v, self.theta, self.theta_bias, self.norm, scale=self.output_scale, dropout=dropout
        )


def _build_norm(norm: ThetaNorm, heads: int) -> nn.Module | None:
    if norm == ThetaNorm.batch:
        return nn.BatchNorm2d(heads)
    if norm == ThetaNorm.layer:
        return nn.LayerNorm(heads)
    return None
