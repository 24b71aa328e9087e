"""One transformer block, and the row of them that an architecture asks for.

Shapes: B batch, N tokens, D dim, H heads.
"""

from __future__ import annotations

from timm.layers import DropPath, LayerScale, Mlp
from torch import Tensor, nn

from deepvit_train.config.model import AttentionConfig, AttentionKind
from deepvit_train.models.attention import Attention, ReAttention, TalkingHeads


class Block(nn.Module):
    """x + gamma * branch(norm(s x)) / s, first with attention, then with the MLP. (B, N, D) -> (B, N, D).

    s is `residual_scale`: 1 in a plain ViT, 0.5 in DeepViT-S and -L, where it doubles each branch. gamma is
    LayerScale's (D,), starting at `layer_scale`, or 1 where that is None.
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
        layer_scale: float | None,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.residual_scale = residual_scale
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, mlp_dim, drop=dropout)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self.ls1(self.attn(self._scaled_norm(self.norm1, x))))
        return self._add(x, self.ls2(self.mlp(self._scaled_norm(self.norm2, x))))

    def forward_with_maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, and the attention maps (B, H, N, N) before and after mixing."""
        branch, before, after = self.attn.forward_with_maps(self._scaled_norm(self.norm1, x))
        x = self._add(x, self.ls1(branch))
        return self._add(x, self.ls2(self.mlp(self._scaled_norm(self.norm2, x)))), before, after

    def _scaled_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x if self.residual_scale == 1.0 else x * self.residual_scale)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + (branch if self.residual_scale == 1.0 else branch / self.residual_scale)


def build_blocks(
    depth: int,
    dim: int,
    heads: int,
    head_dim: int,
    *,
    attn: AttentionConfig,
    qkv_bias: bool,
    mlp_dim: int,
    dropout: float,
    drop_path: float,
    residual_scale: float,
    layer_scale: float | None,
    norm_eps: float,
) -> nn.Sequential:
    """Blocks with plain attention up to `attn.from_block`, then with the attention that `attn` names."""
    attention = {
        "qkv_bias": qkv_bias,
        "attn_dropout": dropout if attn.dropout is None else attn.dropout,
        "dropout": dropout,
    }
    mixing = TalkingHeads if attn.kind == AttentionKind.talking_heads else ReAttention
    blocks: list[Block] = []
    lender: ReAttention | None = None
    for index in range(depth):
        if attn.mixes(index):
            each = mixing(dim, heads, head_dim, attn=attn, lender=lender, **attention)
            lender = each.mixer if attn.theta_shared else None
        else:
            each = Attention(dim, heads, head_dim, **attention)
        blocks.append(
            Block(
                dim,
                each,
                mlp_dim=mlp_dim,
                dropout=dropout,
                drop_path=drop_path * index / max(1, depth - 1),
                residual_scale=residual_scale,
                layer_scale=layer_scale,
                norm_eps=norm_eps,
            )
        )
    return nn.Sequential(*blocks)
