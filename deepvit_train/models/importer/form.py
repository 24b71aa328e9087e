"""Tell the form of attention by the names and shapes of tensors, under this project's names."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from deepvit_train.config.model import ModelConfig, ThetaNorm
from deepvit_train.config.preset import (
    Architecture,
    attention_preset,
    model_preset,
    plain_from,
    section_from,
)
from deepvit_train.config.shipped import choices
from deepvit_train.error import CheckpointError
from deepvit_train.models.attention import attention_class
from deepvit_train.models.importer.layout import Tensors

# The parts of plain attention; what else there is belongs to the mixing of heads.
PLAIN = ("qkv", "proj", "q_norm", "k_norm")


def depth_of(tensors: Tensors) -> int:
    """Return the number of blocks. Raises CheckpointError if some are missing."""
    found = {int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d{1,9})\.", name))}
    if found != set(range(len(found))) or not found:
        raise CheckpointError(f"holds the blocks {sorted(found)[:8]}, which are not all blocks from 0 on")
    return len(found)


def shape_of(tensors: Tensors, name: str, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor. Raises CheckpointError if it is missing or has other dimensions."""
    if name not in tensors:
        raise CheckpointError(f"lacks {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions or not all(shape):
        raise CheckpointError(f"{name} has shape {shape}, not {dimensions} dimensions")
    return shape


def is_mixing(name: str, block: int) -> bool:
    """Return whether a tensor belongs to a block's attention, and not to that of a plain one."""
    prefix = f"blocks.{block}.attn."
    return name.startswith(prefix) and not name.startswith(tuple(f"{prefix}{part}." for part in PLAIN))


def kind_of(tensors: Tensors, block: int, norm: ThetaNorm) -> str:
    """Return the choice of attn= whose blocks have the tensors that this block has.

    The first block that mixes owns all of them, also where blocks share a Theta.
    """
    given = {name.split(".", 3)[3] for name in tensors if name.startswith(f"blocks.{block}.attn.")}
    given -= {"qkv.bias", *(f"{norm}.{part}" for norm in PLAIN[2:] for part in ("weight", "bias"))}
    shape = section_from(ModelConfig, {**plain_from(model_preset("digits").model), "qkv_bias": False})
    for kind in choices("attn"):
        if (preset := attention_preset(kind)).kind == "self":
            continue
        with torch.device("meta"):
            own = attention_class(preset.kind.value)(Architecture(shape, replace(preset, norm=norm)), 0)
        if set(own.state_dict()) == given:
            return kind
    raise CheckpointError(
        f"blocks.{block}.attn has {', '.join(sorted(given))}, which no form of attention here has"
    )


def preset_of_shape(tensors: Tensors) -> tuple[str, int] | None:
    """Return the plain preset of a file's width, depth and MLP, and its heads. None if the file shows heads.

    Several presets may have a shape; they have the same heads then.
    """
    presets = presets_of_shape(tensors)
    return (presets[0], model_preset(presets[0]).model.heads) if presets else None


def presets_of_shape(tensors: Tensors) -> list[str]:
    """Return the plain presets of a file's width, depth and MLP; none if the file mixes heads."""
    depth = depth_of(tensors)
    if any(is_mixing(name, block) for block in range(depth) for name in tensors):
        return []
    width = shape_of(tensors, "pos_embed", 3)[2]
    shape = (width, depth, shape_of(tensors, "blocks.0.mlp.fc1.weight", 2)[0])
    found = []
    for name in choices("model"):
        model, attn = (architecture := model_preset(name)).model, architecture.attn
        if attn.kind == "self" and shape == (model.dim, model.depth, model.mlp_dim):
            found.append(name)
    return found
