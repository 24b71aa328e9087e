"""Turn images into tokens by one of three stems. Each maps (B, C, height, width) to (B, patches, D).

Shapes: B batch, C colour channels, D dim.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn

from deepvit_train.config.model import ModelConfig, Stem


class ConvStem(nn.Module):
    """A convolution whose kernel and stride are the patch size."""

    def __init__(self, model: ModelConfig, channels: int) -> None:
        super().__init__()
        self.patch_size = p = model.patch_size
        self.proj = nn.Conv2d(channels, model.dim, kernel_size=p, stride=p)

    def forward(self, images: Tensor) -> Tensor:
        return rearrange(self.proj(images), "b d h w -> b (h w) d")


class CnnStem(nn.Module):
    """The stem of DeepViT-S and -L: conv7x7/2-BN-ReLU, conv3x3-BN-ReLU, and a convolution into patches.

    The first two convolutions have 64 channels. The first halves the image, so the last one's kernel and
    stride are half the patch size.
    """

    def __init__(self, model: ModelConfig, channels: int) -> None:
        super().__init__()
        self.patch_size = p = model.patch_size
        self.conv1 = nn.Conv2d(channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.conv2 = nn.Conv2d(64, 64, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.proj = nn.Conv2d(64, model.dim, kernel_size=p // 2, stride=p // 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class RearrangeStem(nn.Module):
    """The stem of vit-pytorch: flattened patches, LayerNorm, Linear, LayerNorm."""

    def __init__(self, model: ModelConfig, channels: int) -> None:
        super().__init__()
        self.patch_size = model.patch_size
        self.norm1 = nn.LayerNorm(channels * model.patch_size**2)
        self.proj = nn.Linear(channels * model.patch_size**2, model.dim)
        self.norm2 = nn.LayerNorm(model.dim)

    def forward(self, images: Tensor) -> Tensor:
        p = self.patch_size
        patches = rearrange(images, "b c (h p1) (w p2) -> b (h w) (p1 p2 c)", p1=p, p2=p)
        return self.norm2(self.proj(self.norm1(patches)))


def build_stem(model: ModelConfig, channels: int) -> nn.Module:
    """Return the stem that `model.stem` names."""
    return {Stem.conv: ConvStem, Stem.cnn: CnnStem, Stem.rearrange: RearrangeStem}[model.stem](
        model, channels
    )
