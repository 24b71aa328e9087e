"""DeepViT: a vision transformer whose blocks may mix their attention heads (arXiv 2103.11886).

Shapes: B batch, C colour channels, N tokens (class token and registers included), D dim, H heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from deepvit_train.config.model import AttentionConfig, Init, Pool, Stem, check_architecture
from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.models.block import build_blocks
from deepvit_train.models.stem import build_stem
from deepvit_train.models.timm_interface import TimmInterface, pool_named, pretrained_cfg_of


class DeepViT(TimmInterface):
    """A vision transformer with plain attention, re-attention, or some blocks of each.

    With the keywords up to `emb_dropout` alone it is vit-pytorch's DeepViT, and takes the same keywords; the
    others choose the paper's form, the plain ViT and the stems. Use `build_model` to build one from
    configuration.

    Args:
        image_size, patch_size: pixels; square; the patch divides the image.
        num_classes: width of the classifier; 0: none, the pooled features are returned.
        dim, depth, heads, mlp_dim, dim_head: widths and counts; heads need not tile dim.
        pool: 'cls' reads the class token, 'mean' the mean of class token and patches.
        dropout: after projections, inside the MLP, and on the attention maps unless `attn` says otherwise.
        attn: the name of a shipped attention (`attn=` on the command line), or an AttentionConfig.
        stem, init: a Stem and an Init, or their names.
        drop_path: stochastic depth of the last block, rising linearly from 0 at the first.
        residual_scale: s in x + branch(norm(s x)) / s.
        layer_scale: where LayerScale's factors on each branch start; None: no LayerScale.
        registers: learned tokens besides the class token that no head reads (arXiv 2309.16588).

    Raises:
        ConfigError (a ValueError): naming the argument, its value and the nearest valid one.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        attn: str | AttentionConfig = "reattention_seed",
        stem: str = "rearrange",
        init: str = "seed",
        qkv_bias: bool = False,
        drop_path: float = 0.0,
        residual_scale: float = 1.0,
        layer_scale: float | None = None,
        registers: int = 0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        attn = attention_preset(attn) if isinstance(attn, str) else attn
        # Any preset does here: the keys that are not replaced play no part in what is checked.
        shape = {
            "image_size": image_size,
            "patch_size": patch_size,
            "dim": dim,
            "depth": depth,
            "heads": heads,
        }
        choices = {"head_dim": dim_head, "pool": pool_named(pool), "stem": Stem(stem), "init": Init(init)}
        check_architecture(dataclasses.replace(model_preset("digits").model, **shape, **choices), attn)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.num_prefix_tokens = 1 + registers
        self.heads = heads
        self.attn = attn
        self.pool = pool_named(pool)

        self.patch_embed = build_stem(Stem(stem), patch_size, channels, dim)
        tokens = (image_size // patch_size) ** 2 + 1
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.reg_token = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))
        self.pos_drop = nn.Dropout(emb_dropout)
        self.blocks = build_blocks(
            depth,
            dim,
            heads,
            dim_head,
            attn=attn,
            qkv_bias=qkv_bias,
            mlp_dim=mlp_dim,
            dropout=dropout,
            drop_path=drop_path,
            residual_scale=residual_scale,
            layer_scale=layer_scale,
            norm_eps=norm_eps,
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head_drop = nn.Dropout(0.0)  # set by timm's drop_rate
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self._init_weights(Init(init))

    def _init_weights(self, init: Init) -> None:
        for tokens in (self.cls_token, self.reg_token, self.pos_embed):
            if tokens is not None:
                nn.init.normal_(tokens) if init == Init.seed else trunc_normal_(tokens, std=0.02)
        if init == Init.seed:
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, map_blocks: int = 0) -> Any:
        """(B, C, height, width), normalised -> logits (B, classes).

        With `map_blocks`, returns (logits, maps): for each of the first so many blocks the maps
        (B, H, N, N) that multiply V, with gradients.
        """
        x = self.embed(images)
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index < map_blocks:
                x, _, after = self.run_block(block, x, maps=True)
                maps.append(after)
            else:
                x = self.run_block(block, x)
        logits = self.forward_head(self._normalised(x))
        return (logits, maps) if map_blocks else logits

    def forward_features(self, images: Tensor) -> Tensor:
        """The tokens after the last block: (B, N, D). Normalised unless their mean is what the head reads."""
        x = self.embed(images)
        for block in self.blocks:
            x = self.run_block(block, x)
        return self._normalised(x)

    def embed(self, images: Tensor) -> Tensor:
        """The tokens before the first block (B, N, D): class token, registers, patches."""
        patches = self.patch_embed(images)
        batch = patches.shape[0]  # len() would fix the batch size in an exported graph
        x = torch.cat([self.cls_token.expand(batch, -1, -1), patches], dim=1) + self.pos_embed
        if self.reg_token is not None:
            x = torch.cat([x[:, :1], self.reg_token.expand(batch, -1, -1), x[:, 1:]], dim=1)
        return self.pos_drop(x)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens and classify them. (B, N, D) -> (B, classes), with `pre_logits` (B, D)."""
        if self.pool == Pool.mean:
            tokens = self.norm(self._mean(tokens))
        elif self.pool == Pool.cls:
            tokens = tokens[:, 0]
        return self.head_drop(tokens) if pre_logits else self.head(self.head_drop(tokens))

    def _mean(self, tokens: Tensor) -> Tensor:
        if self.reg_token is not None:
            tokens = torch.cat([tokens[:, :1], tokens[:, self.num_prefix_tokens :]], dim=1)
        return tokens.mean(dim=1)

    def _normalised(self, tokens: Tensor) -> Tensor:
        return tokens if self.pool == Pool.mean else self.norm(tokens)


def build_model(architecture: Architecture, num_classes: int, channels: int = 3) -> DeepViT:
    """The model that a configuration describes, with fresh weights."""
    model = architecture.model
    built = DeepViT(
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_classes=num_classes,
        dim=model.dim,
        depth=model.depth,
        heads=model.heads,
        mlp_dim=model.mlp_dim,
        pool=model.pool,
        channels=channels,
        dim_head=model.width_of_head,
        dropout=model.dropout,
        emb_dropout=model.emb_dropout,
        attn=architecture.attn,
        stem=model.stem,
        init=model.init,
        qkv_bias=model.qkv_bias,
        drop_path=model.drop_path,
        residual_scale=model.residual_scale,
        layer_scale=model.layer_scale,
        registers=model.registers,
        norm_eps=model.norm_eps,
    )
    built.pretrained_cfg = built.default_cfg = pretrained_cfg_of(model, num_classes, channels)
    return built
