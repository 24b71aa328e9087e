"""One transformer block.

Shapes: B batch, N tokens, D dim.
"""

from __future__ import annotations

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from deepvit_train.models.attention import Attention


class Block(nn.Module):
    """x + branch(norm(s x)) / s, first with attention, then with the MLP. (B, N, D) -> (B, N, D).

    s is `residual_scale`: 1 in a plain ViT, 0.5 in DeepViT-S and -L, where it doubles each branch.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        *,
        mlp_dim: int,
        dropout: float,
        drop_path: float,
        residual_scale: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_dim, drop=dropout)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self.norm1, self.attn)
        return self._add(x, self.norm2, self.mlp)

    def _add(self, x: Tensor, norm: nn.Module, branch: nn.Module) -> Tensor:
        s = self.residual_scale
        if s == 1.0:
            return x + self.drop_path(branch(norm(x)))
        return x + self.drop_path(branch(norm(x * s))) / s
