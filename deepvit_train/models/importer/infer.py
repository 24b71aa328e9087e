"""Infer an architecture from tensors under this project's names.

What no tensor shows comes from a preset or from the caller.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from deepvit_train.config.model import (
    Act,
    AttentionConfig,
    Init,
    ModelConfig,
    Pool,
    Stem,
    ThetaNorm,
    mlp_ratio_of,
)
from deepvit_train.config.preprocessing import Interpolation
from deepvit_train.config.preset import (
    Architecture,
    attention_preset,
    plain_from,
    section_from,
)
from deepvit_train.console import amount
from deepvit_train.error import CheckpointError, ConfigError, nearest
from deepvit_train.models.importer.form import depth_of, is_mixing, kind_of, preset_of_shape, shape_of
from deepvit_train.models.importer.layout import Tensors
from deepvit_train.models.keyword import UNSAID

# What a caller may say, because no tensor shows it. Theta shows the heads; without one the caller may.
CHOICES = {
    "heads": int,
    "act": Act,
    "transform_scale": bool,
    "residual_scale": float,
    "pool": Pool,
    "norm_eps": float,
    "dropout": float,
    "emb_dropout": float,
    "drop_path": float,
    "mean": list,
    "std": list,
    "crop_pct": float,
    "interpolation": Interpolation,
}
# What tells the norm of mixed maps: the first of these tensors that a file has.
NORM_TENSORS = {
    "running_mean": ThetaNorm.batch,
    "weight": ThetaNorm.layer,
    "gain": ThetaNorm.centred,
    "omega": ThetaNorm.attn_scale,
}


def checked_choices(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides as the schema holds them, without those that are None.

    Raises ConfigError for a key that nobody can choose.
    """
    for name in overrides:
        if name not in CHOICES:
            raise ConfigError(
                f"{name}: can't be chosen for a weights file{nearest(name, list(CHOICES))} "
                f"(choices: {', '.join(CHOICES)}; the tensors show the rest)"
            )
    return {name: CHOICES[name](value) for name, value in overrides.items() if value is not None}


def infer_architecture(
    tensors: Tensors, norm_eps: float | None, preset: Architecture | None, choices: dict[str, Any]
) -> Architecture:
    """Infer the architecture of a model from its tensors.

    Args:
        tensors: all tensors of the model, under this project's names.
        norm_eps: epsilon of the LayerNorms if neither preset nor choices give it; None: what is usual for the
            stem.
        preset: gives what no tensor shows, if the choices do not; sizes always come from the tensors.
        choices: what the caller chose, from `checked_choices`.

    Raises:
        CheckpointError: a tensor is missing or has a shape that fits no architecture, or the caller has to
            choose something.
        ConfigError: a value is out of bounds.
    """
    attn = _attention(tensors, preset, choices)
    stem = _stem(tensors)
    if preset is not None:
        unseen = plain_from(preset.model)
    elif stem == Stem.cnn and "residual_scale" not in choices:
        raise CheckpointError(
            "the convolutional stem is DeepViT-S's and -L's, which scale residuals, and no tensor shows "
            "how; give preset=deepvit_s, or residual_scale= and transform_scale="
        )
    else:
        unseen = UNSAID | {"norm_eps": norm_eps or (1e-5 if stem == Stem.rearrange else 1e-6)}
    said = {name: value for name, value in choices.items() if name not in ("heads", "transform_scale")}
    model = section_from(ModelConfig, unseen | _sizes(tensors, stem, preset, choices) | said)
    return Architecture(model, attn)


def _sizes(
    tensors: Tensors, stem: Stem, preset: Architecture | None, choices: dict[str, Any]
) -> dict[str, Any]:
    patch_size = _patch_size(tensors, stem)
    _, positions, dim = shape_of(tensors, "pos_embed", 3)
    class_token = "cls_token" in tensors
    patches = positions - class_token
    grid = math.isqrt(max(0, patches))
    if not grid or grid**2 != patches:
        token = "a class token's and " if class_token else ""
        raise CheckpointError(f"pos_embed has {positions} positions, not {token}a square of patches")
    hidden = shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)[0]
    width = shape_of(tensors, "blocks.0.attn.qkv.weight", 2)[0]
    heads = _heads(tensors, preset, choices)
    if width % (3 * heads):
        raise CheckpointError(f"blocks.0.attn.qkv.weight has {width} rows, not 3 x {heads} heads x head_dim")
    head_dim = width // 3 // heads
    gamma = tensors.get("blocks.0.ls1.gamma")
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "stem": stem,
        "dim": dim,
        "depth": depth_of(tensors),
        "heads": heads,
        "head_dim": None if heads * head_dim == dim else head_dim,
        "mlp_ratio": mlp_ratio_of(hidden, dim),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "class_token": class_token,
        "pre_norm": "norm_pre.weight" in tensors,
        # The learned factors are loaded, so this value only says that there are some.
        "layer_scale": None if gamma is None else 1.0,
        "registers": shape_of(tensors, "reg_token", 3)[1] if "reg_token" in tensors else 0,
        "init": Init.vit_pytorch if stem == Stem.rearrange else Init.vit,
        "weights": None,
    }


def _attention(tensors: Tensors, preset: Architecture | None, choices: dict[str, Any]) -> AttentionConfig:
    depth = depth_of(tensors)
    mixing = [index for index in range(depth) if any(is_mixing(name, index) for name in tensors)]
    if not mixing:
        return attention_preset("self")
    first = mixing[0]
    if mixing != list(range(first, depth)):
        raise CheckpointError(
            f"mixes heads in the blocks {mixing}; here all blocks from the first one that mixes must do so"
        )
    norm = _theta_norm(tensors, first)
    kind = kind_of(tensors, first, norm)
    if "transform_scale" in choices:
        scale = choices["transform_scale"]
    elif preset is not None:
        scale = preset.attn.transform_scale
    elif _stem(tensors) == Stem.cnn:
        raise CheckpointError(
            "re-attention after a convolutional stem may scale its maps (DeepViT-S) or not (-L), and no "
            "tensor shows which; give preset=deepvit_s, preset=deepvit_l or transform_scale="
        )
    else:
        scale = False
    return replace(
        attention_preset(kind),
        from_block=first,
        norm=norm,
        theta_shared=0 < sum(name.endswith(".attn.theta") for name in tensors) < len(mixing),
        transform_scale=scale,
    )


def _theta_norm(tensors: Tensors, block: int) -> ThetaNorm:
    for name, norm in NORM_TENSORS.items():
        if f"blocks.{block}.attn.norm.{name}" in tensors:
            return norm
    return ThetaNorm.none


def _heads(tensors: Tensors, preset: Architecture | None, choices: dict[str, Any]) -> int:
    thetas = [name for name in tensors if name.endswith(".attn.theta")]
    if thetas:
        heads = shape_of(tensors, thetas[0], 2)[0]
        if choices.get("heads", heads) != heads:
            raise CheckpointError(f"heads={choices['heads']}, but {thetas[0]} has {amount(heads, 'head')}")
        return heads
    if "heads" in choices:
        return choices["heads"]
    name, known = preset_of_shape(tensors) or (None, None)
    hint = f" (model={name} has its shape, with {amount(known, 'head')})" if known else ""
    if preset is None:
        raise CheckpointError(
            f"plain attention does not show its number of heads; give heads= or preset={hint}"
        )
    if known and known != preset.model.heads:
        raise CheckpointError(
            f"preset= has {amount(preset.model.heads, 'head')}, and no tensor shows the file's; "
            f"give heads={hint}"
        )
    return preset.model.heads


def _stem(tensors: Tensors) -> Stem:
    if "patch_embed.conv1.weight" in tensors:
        return Stem.cnn
    return Stem.rearrange if "patch_embed.norm1.weight" in tensors else Stem.conv


def _patch_size(tensors: Tensors, stem: Stem) -> int:
    if stem == Stem.rearrange:
        pixels = shape_of(tensors, "patch_embed.norm1.weight", 1)[0]
        return math.isqrt(pixels // channels_of(tensors))
    _, _, height, width = shape_of(tensors, "patch_embed.proj.weight", 4)
    if height != width:
        raise CheckpointError(
            f"patch_embed.proj.weight has patches of {height} x {width}; square ones can be loaded"
        )
    return 2 * width if stem == Stem.cnn else width


def channels_of(tensors: Tensors) -> int:
    """Return the colour channels of a model's images.

    Flattened patches do not show them: then it is 3 if patches of 3 channels are square, else 1. Raises
    CheckpointError if neither fits.
    """
    stem = _stem(tensors)
    if stem != Stem.rearrange:
        return shape_of(
            tensors, "patch_embed.conv1.weight" if stem == Stem.cnn else "patch_embed.proj.weight", 4
        )[1]
    pixels = shape_of(tensors, "patch_embed.norm1.weight", 1)[0]
    for channels in (3, 1):
        if channels * math.isqrt(pixels // channels) ** 2 == pixels:
            return channels
    raise CheckpointError(
        f"patch_embed.norm1.weight has {pixels} values, which make no square patch of 3 or 1 channels"
    )
