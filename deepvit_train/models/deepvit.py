"""Build DeepViT, a vision transformer whose blocks may mix their attention heads (arXiv 2103.11886).

Shapes: B batch, C colour channels, N tokens (class token and registers included), D dim, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from deepvit_train.config.model import Init, Pool
from deepvit_train.config.preset import Architecture, file_limits
from deepvit_train.models.attention import Attention
from deepvit_train.models.block import build_blocks
from deepvit_train.models.keyword import vit_pytorch_architecture
from deepvit_train.models.stem import build_stem
from deepvit_train.models.timm_interface import TimmInterface, pretrained_cfg_of

if TYPE_CHECKING:
    from deepvit_train.data.pixels import ImageTransform


class DeepViT(TimmInterface):
    """A vision transformer with plain attention, re-attention, or some blocks of each.

    DeepViT(model_preset("deepvit_s"), 1000) builds an architecture. vit-pytorch's keywords build its DeepViT:
    DeepViT(image_size=256, patch_size=32, num_classes=1000, dim=1024, depth=6, heads=16, mlp_dim=2048).

    Args:
        architecture: shape of the model, and its attention.
        num_classes: width of the classifier; 0: no classifier, the model returns the pooled features.
        channels: colour channels of the images.
        keywords: what `keyword.vit_pytorch_architecture` takes, in place of an architecture.

    Attributes:
        class_names: the names of the outputs in order, or None where they are not known.
        preprocessing: what the model expects of its images.
        value_range: the values of images of more than 8 bits that become black and white, or None for all
            that their type holds.

    Raises:
        ConfigError: (a ValueError) a keyword is unknown or its value out of bounds; the nearest is named.
        TypeError: there are keywords beside an architecture, or a size is missing.
    """

    def __init__(
        self,
        architecture: Architecture | None = None,
        num_classes: int = 1000,
        channels: int = 3,
        **keywords: Any,
    ) -> None:
        super().__init__()
        if architecture is None:
            architecture = vit_pytorch_architecture(**keywords)
        elif keywords:
            raise TypeError(f"DeepViT takes an architecture, or vit-pytorch's keywords: {sorted(keywords)}")
        model = architecture.model
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = model.dim
        self.num_prefix_tokens = int(model.class_token) + model.registers
        self.heads = model.heads
        self.attn = architecture.attn
        self.pool = model.pool
        self.preprocessing = model.preprocessing
        self.value_range: tuple[float, float] | None = None
        self.pretrained_cfg = self.default_cfg = pretrained_cfg_of(model, num_classes, channels)

        self.patch_embed = build_stem(model, channels)
        tokens = (model.image_size // model.patch_size) ** 2 + int(model.class_token)
        self.cls_token = nn.Parameter(torch.empty(1, 1, model.dim)) if model.class_token else None
        registers = torch.empty(1, model.registers, model.dim)
        self.reg_token = nn.Parameter(registers) if model.registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, model.dim))
        self.pos_drop = nn.Dropout(model.emb_dropout)
        self.norm_pre, self.norm = (
            nn.LayerNorm(model.dim, eps=model.norm_eps) if wanted else nn.Identity()
            for wanted in (model.pre_norm, model.final_norm)
        )
        self.blocks = build_blocks(architecture)
        self.head_drop = nn.Dropout(0.0)  # timm's drop_rate sets it
        self.head = nn.Linear(model.dim, num_classes) if num_classes else nn.Identity()
        self._init_weights(model.init)
        if architecture.attn.qk_gain != 1.0:
            for module in self.modules():
                if isinstance(module, Attention):
                    module.scale_queries_and_keys(architecture.attn.qk_gain)

    def _init_weights(self, init: Init) -> None:
        for tokens in (self.cls_token, self.reg_token, self.pos_embed):
            if tokens is not None:
                nn.init.normal_(tokens) if init == Init.vit_pytorch else trunc_normal_(tokens, std=0.02)
        if init == Init.vit_pytorch:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def transform(self) -> ImageTransform:
        """Return what turns a path, bytes or a Pillow image into the pixels (3, S, S) of an evaluation."""
        # Imported here, because whoever trains from timm's loaders needs no decoder.
        from deepvit_train.data.decode import Limits
        from deepvit_train.data.pixels import ImageTransform

        return ImageTransform(self.preprocessing, Limits(*file_limits(), self.value_range))

    def forward(self, images: Tensor, map_blocks: int = 0) -> Any:
        """Classify normalised images. (B, C, height, width) -> logits (B, classes).

        If `map_blocks` is not 0, returns (logits, maps) instead. The maps (B, H, N, N) are those that
        multiply V in the first `map_blocks` blocks; gradients flow through them.
        """
        x = self.embed(images)
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index < map_blocks:
                x, _, after = self.run_block(block, x, maps=True)
                maps.append(after)
            else:
                x = self.run_block(block, x)
        logits = self.forward_head(self.normalise(x))
        return (logits, maps) if map_blocks else logits

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the tokens after the last block, (B, N, D).

        They have been through the final norm, except where the head reads their mean and normalises that.
        """
        x = self.embed(images)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self.normalise(x)

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before the first block: class token, registers, patches. -> (B, N, D)."""
        x = self.patch_embed(images)
        batch = x.shape[0]  # len() would fix the batch size in an exported graph
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
        x = x + self.pos_embed
        if self.reg_token is not None:
            cls, patches = x.tensor_split([self.num_class_tokens], dim=1)
            x = torch.cat([cls, self.reg_token.expand(batch, -1, -1), patches], dim=1)
        return self.norm_pre(self.pos_drop(x))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens and classify them. (B, N, D) -> (B, classes), or (B, D) with `pre_logits`."""
        if self.pool == Pool.mean:
            tokens = self.norm(self._mean(tokens))
        elif self.pool == Pool.mean_patches:
            tokens = self.norm(tokens[:, self.num_prefix_tokens :].mean(dim=1))
        elif self.pool == Pool.mean_normed_patches:
            tokens = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        elif self.pool == Pool.cls:
            tokens = tokens[:, 0]
        return self.head_drop(tokens) if pre_logits else self.head(self.head_drop(tokens))

    def _mean(self, tokens: Tensor) -> Tensor:
        if self.reg_token is not None:
            cls, patches = tokens[:, : self.num_class_tokens], tokens[:, self.num_prefix_tokens :]
            tokens = torch.cat([cls, patches], dim=1)
        return tokens.mean(dim=1)

    def normalise(self, tokens: Tensor) -> Tensor:
        """Apply the final norm to tokens (B, N, D), except where the head does so itself."""
        return tokens if self.pool in (Pool.mean, Pool.mean_patches) else self.norm(tokens)
