"""Translate the tensor names of timm's VisionTransformer, which DeiT shares.

They are cls_token, reg_token, pos_embed, patch_embed.proj.*, blocks.i.{norm1, norm2}.*,
blocks.i.attn.{qkv, proj}.*, blocks.i.{ls1, ls2}.gamma, blocks.i.mlp.{fc1, fc2}.*, norm.*, head.*.
A model that was trained with global_pool=avg has fc_norm.* in the place of norm.*, unless it was told
fc_norm=False.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from deepvit_train.classes import TIMM
from deepvit_train.config.model import Pool
from deepvit_train.models.importer.layout import Layout, Tensors

NORM_AFTER_MEAN = "fc_norm.weight"
RULES = (
    (r"(cls_token|reg_token|pos_embed)", r"\1"),
    (r"patch_embed\.proj\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(\w+)", r"blocks.\1.\2.\3"),
    (r"blocks\.(\d+)\.(ls[12])\.gamma", r"blocks.\1.\2.gamma"),
    (r"(norm|head)\.(weight|bias)", r"\1.\2"),
    (r"fc_norm\.(weight|bias)", r"norm.\1"),
)


def _with_own_positions(tensors: Tensors) -> Tensors:
    """Give the position embeddings this project's form: one for the class token, then those of the patches.

    In timm they may also be for patches alone, or for registers too. The position of a register is added to
    the register.
    """
    positions, registers = tensors.get("pos_embed"), tensors.get("reg_token")
    if positions is None or positions.ndim != 3:
        return tensors
    count, extra = positions.shape[1], 0 if registers is None else registers.shape[1]
    if _is_square(count - 1):
        return tensors
    if _is_square(count):
        nothing = torch.zeros_like(positions[:, :1])
        return tensors | {"pos_embed": torch.cat([nothing, positions], dim=1)}
    if registers is not None and _is_square(count - 1 - extra):
        cls, own, patches = positions.split([1, extra, count - 1 - extra], dim=1)
        return tensors | {"pos_embed": torch.cat([cls, patches], dim=1), "reg_token": registers + own}
    return tensors


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def choices_with_pool(choices: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Put what timm's head reads into what the caller says of a file with these names.

    timm's mean leaves out the class token, and fc_norm comes after it, but norm before it. Only fc_norm shows
    that there is a mean at all.
    """
    if NORM_AFTER_MEAN in names:
        return {"pool": Pool.mean_patches} | choices | _mean_as(choices, Pool.mean_patches)
    return choices | _mean_as(choices, Pool.mean_normed_patches)


def _mean_as(choices: dict[str, Any], pool: Pool) -> dict[str, Any]:
    return {"pool": pool} if choices.get("pool") == Pool.mean else {}


LAYOUT = Layout("timm", r"^blocks\.\d+\.attn\.qkv\.weight$", RULES, 1e-6, _with_own_positions, TIMM)
