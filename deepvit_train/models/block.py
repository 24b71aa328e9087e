"""Build a transformer block, or all the blocks of an architecture.

Shapes: B batch, N tokens, D dim, H heads.
"""

from __future__ import annotations

from timm.layers import DropPath, GELUTanh, LayerScale, Mlp, QuickGELU
from torch import Tensor, nn

from deepvit_train.config.model import Act
from deepvit_train.config.preset import Architecture
from deepvit_train.error import ConfigError
from deepvit_train.models.attention import ReAttention, build_attention

ACTS: dict[Act, type[nn.Module]] = {
    Act.gelu: nn.GELU,
    Act.gelu_tanh: GELUTanh,
    Act.quick_gelu: QuickGELU,
}


class Block(nn.Module):
    """A transformer block: x + gamma * branch(norm(s x)) / s, first with attention, then with the MLP.

    s is `residual_scale`: 1 in a plain ViT, and 0.5 in DeepViT-S and -L, where it doubles each branch. gamma
    (D,) is learned by LayerScale and starts at `layer_scale`; where that is None, gamma is 1. Stochastic
    depth drops a branch with a probability that rises linearly over the blocks, from 0 to `drop_path`.
    Input and output are (B, N, D).

    Args:
        architecture: gives every size, and says which blocks mix their heads.
        index: number of the block, from 0.
    """

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        model = architecture.model
        drop_path = model.drop_path * index / max(1, model.depth - 1)
        self.residual_scale = model.residual_scale
        self.norm1 = nn.LayerNorm(model.dim, eps=model.norm_eps)
        self.attn = build_attention(architecture, index)
        self.norm2 = nn.LayerNorm(model.dim, eps=model.norm_eps)
        self.mlp = Mlp(model.dim, model.mlp_dim, act_layer=ACTS[model.act], drop=model.dropout)
        self.ls1, self.ls2 = (
            nn.Identity() if model.layer_scale is None else LayerScale(model.dim, model.layer_scale)
            for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(self._add(x, self.ls1(self.attn(self._scaled_norm(self.norm1, x)))))

    def forward_with_maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same as `forward`, and return the maps (B, H, N, N) before and after mixing as well."""
        x, before, after = self.attend_with_maps(x)
        return self.transform(x), before, after

    def attend_with_maps(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Do the block's first half, attention: returns (x, before, after). `given` is as in Attention."""
        branch, before, after = self.attn.forward_with_maps(self._scaled_norm(self.norm1, x), given)
        return self._add(x, self.ls1(branch)), before, after

    def transform(self, x: Tensor) -> Tensor:
        """Do the block's second half, the MLP."""
        return self._add(x, self.ls2(self.mlp(self._scaled_norm(self.norm2, x))))

    def _scaled_norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x if self.residual_scale == 1.0 else x * self.residual_scale)

    def _add(self, x: Tensor, branch: Tensor) -> Tensor:
        branch = self.drop_path(branch)
        return x + (branch if self.residual_scale == 1.0 else branch / self.residual_scale)


def build_blocks(architecture: Architecture) -> nn.Sequential:
    """Return the blocks of an architecture, in order.

    Raises ConfigError if they are to share a Theta and have none.
    """
    attn = architecture.attn
    blocks = [Block(architecture, index) for index in range(architecture.model.depth)]
    for index, block in enumerate(blocks):
        if attn.borrows(index):
            borrower, lender = block.attn, blocks[attn.first].attn
            if not (isinstance(borrower, ReAttention) and isinstance(lender, ReAttention)):
                raise ConfigError(f"attn.theta_shared=true: attn.kind={attn.kind} has no Theta to share")
            borrower.borrow(lender)
    return nn.Sequential(*blocks)
