"""Translate the tensor names of timm's VisionTransformer, which DeiT, MAE, DINO and DINOv2 share.

They are cls_token, reg_token, dist_token, pos_embed, patch_embed.proj.*, norm_pre.*,
blocks.i.{norm1, norm2}.*, blocks.i.attn.{qkv, q_norm, k_norm, proj}.*, blocks.i.{ls1, ls2}.gamma,
blocks.i.mlp.{fc1, fc2}.*, norm.*, head.*.
A model that was trained with global_pool=avg has fc_norm.* in the place of norm.*, unless it was told
fc_norm=False. `public.py` brings the layouts of other projects into this form, by timm's own function.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from deepvit_train.classes import TIMM
from deepvit_train.config.model import Pool
from deepvit_train.config.preset import Architecture
from deepvit_train.error import CheckpointError
from deepvit_train.models.importer import public
from deepvit_train.models.importer.layout import Layout, Prepared, Tensors, Translated

NORM_AFTER_MEAN = "fc_norm.weight"
ASKS = "asks"  # in Prepared.shown: why the tensors alone do not show what is computed
CLIP_EPS = 1e-5  # of the LayerNorms of timm's models with a norm before the blocks
RULES = (
    (r"(cls_token|reg_token|pos_embed)", r"\1"),
    (r"dist_token", r"reg_token"),
    (r"patch_embed\.proj\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"blocks\.(\d+)\.(norm1|norm2|attn\.(?:qkv|q_norm|k_norm|proj)|mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
    (r"blocks\.(\d+)\.(ls[12])\.gamma", r"blocks.\1.\2.gamma"),
    (r"(norm_pre|norm|head)\.(weight|bias)", r"\1.\2"),
    (r"fc_norm\.(weight|bias)", r"norm.\1"),
)


def _prepared(tensors: Tensors) -> Prepared:
    given, left_out = public.in_timms_form(tensors)
    shown: dict[str, Any] = {}
    if any(name.endswith(".gamma_1") for name in tensors):
        shown[ASKS] = "DeiT III's files and those of models with rotary positions have the same names"
    if "cls_token" not in given:
        shown["pool"] = Pool.mean_normed_patches
    if NORM_AFTER_MEAN in given:
        shown["pool"] = Pool.mean_patches
    if "norm_pre.weight" in given:
        shown["norm_eps"] = CLIP_EPS
    return Prepared(given, left_out, shown)


def with_own_form(tensors: Tensors) -> Tensors:
    """Give the tensors this project's form: a stem with a bias, and positions as here.

    A stem before a norm has no bias in timm, which is a bias of 0.
    """
    kernel = tensors.get("patch_embed.proj.weight")
    if "norm_pre.weight" in tensors and "patch_embed.proj.bias" not in tensors and kernel is not None:
        tensors = tensors | {"patch_embed.proj.bias": torch.zeros(kernel.shape[:1], dtype=kernel.dtype)}
    return _with_own_positions(tensors)


def _with_own_positions(tensors: Tensors) -> Tensors:
    """Give the position embeddings this project's form: one for the class token, then those of the patches.

    In timm they may also be for patches alone, or for registers too. The position of a register is added to
    the register. A distilled DeiT's second token is a register with a position.
    """
    positions, registers, cls = (tensors.get(name) for name in ("pos_embed", "reg_token", "cls_token"))
    if positions is None or positions.ndim != 3 or (registers is not None and registers.ndim != 3):
        return tensors
    count, classes = positions.shape[1], int(cls is not None)
    extra = 0 if registers is None else registers.shape[1]
    if _is_square(count - classes):
        return tensors
    if classes and _is_square(count):
        nothing = torch.zeros_like(positions[:, :1])
        return tensors | {"pos_embed": torch.cat([nothing, positions], dim=1)}
    if registers is not None and _is_square(count - classes - extra):
        if registers.shape[2] != positions.shape[2]:
            raise CheckpointError(f"reg_token has width {registers.shape[2]}, pos_embed {positions.shape[2]}")
        first, own, patches = positions.split([classes, extra, count - classes - extra], dim=1)
        return tensors | {"pos_embed": torch.cat([first, patches], dim=1), "reg_token": registers + own}
    return tensors


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number


def checked_choices_of_timm(
    translated: Translated, choices: dict[str, Any], named: Architecture | None
) -> dict[str, Any]:
    """Return what the caller says of a file, and what its layout shows where nobody says anything.

    timm's mean leaves out the class token, and fc_norm comes after it, but norm before it. Only fc_norm shows
    that there is a mean at all, so `pool=mean` becomes the one or the other.

    Args:
        translated: the file's tensors, and what its layout shows.
        choices: what the caller says.
        named: the architecture of the model of timm that the caller names. It says everything.

    Raises CheckpointError where several models of timm have such tensors, and compute different things.
    """
    tensors, shown = translated.tensors, dict(translated.shown)
    asks = shown.pop(ASKS, None)
    if choices.get("pool") == Pool.mean:
        choices = choices | {"pool": shown.get("pool", Pool.mean_normed_patches)}
    if named is not None:
        after = [each == Pool.mean_patches for each in (shown.get("pool"), named.model.pool)]
        if after[0] != after[1] and named.model.final_norm:
            raise CheckpointError(
                f"its last norm comes {'after' if after[0] else 'before'} the pooling, unlike the preset's"
            )
        return {"heads": named.model.heads} | choices
    if asks is not None:
        raise CheckpointError(f"{asks}; give preset=timm:NAME")
    lacks_token = "cls_token" not in tensors
    if lacks_token and not tensors.keys() & {"reg_token", "blocks.0.ls1.gamma", "blocks.0.attn.qkv.bias"}:
        raise CheckpointError(
            "has neither class token nor biases of qkv: timm has such models with norms before and after a "
            "branch, and no tensor shows which; give preset=timm:NAME"
        )
    kinds = ["no class token"] * lacks_token + ["a norm before the blocks"] * ("norm_pre.weight" in tensors)
    if kinds and "act" not in choices:
        raise CheckpointError(
            f"has {' and '.join(kinds)}: such models (CLIP, SigLIP) have one of several activations, and no "
            "tensor shows which; give preset=timm:NAME, or act=gelu, act=quick_gelu or act=gelu_tanh"
        )
    return shown | choices


LAYOUT = Layout("timm", public.MARK, RULES, 1e-6, with_own_form, TIMM, _prepared)
