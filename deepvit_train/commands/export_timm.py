"""Write a model with plain attention as a folder that timm.create_model("local-dir:FOLDER") builds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepvit_train.atomic import write_text
from deepvit_train.config.model import Pool, Stem
from deepvit_train.config.preset import Architecture
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT
from deepvit_train.run.description import ModelDescription
from deepvit_train.run.saving import save_tensors

# timm's pooling of a class token or of the patches, and whether its norm comes after the mean.
POOLS = {
    Pool.cls: ("token", False),
    Pool.mean_patches: ("avg", True),
    Pool.mean_normed_patches: ("avg", False),
}
# What timm's configuration of pretrained weights says as this project does.
PRETRAINED = (
    "input_size",
    "crop_pct",
    "interpolation",
    "mean",
    "std",
    "fixed_input_size",
    "first_conv",
    "classifier",
)
EPS = 1e-6  # of timm's LayerNorms; its configuration has no key for it


def check_timm(architecture: Architecture) -> None:
    """Raise ConfigError that names what timm's VisionTransformer has no counterpart for."""
    model, attn = architecture.model, architecture.attn
    if attn.kind.value != "self":
        raise ConfigError(
            f"format=timm: holds plain attention alone, so attn={attn.kind} can't be written; nearest: "
            "format=pt2, or format=onnx\n"
            "timm.create_model knows this package's presets after `import deepvit_train.models`"
        )
    lacks = {
        f"model.stem={model.stem}": model.stem != Stem.conv,
        f"model.pool={model.pool}": model.pool not in POOLS,
        f"model.residual_scale={model.residual_scale:g}": model.residual_scale != 1.0,
        f"model.norm_eps={model.norm_eps:g}": model.norm_eps != EPS,
        "model.pre_norm=true": model.pre_norm,
        f"model.head_dim={model.head_dim}": model.width_of_head * model.heads != model.dim,
    }
    if found := [name for name, lacking in lacks.items() if lacking]:
        raise ConfigError(
            f"format=timm: timm's VisionTransformer has nothing like {', '.join(found)}; "
            "nearest: format=pt2, or format=onnx"
        )


def write_timm(model: DeepViT, about: ModelDescription, description: dict[str, Any], file: Path) -> None:
    """Write the weights file, and timm's config.json beside it."""
    tensors = timm_tensors(model)
    # Where timm's tensors are this project's, the file says here too what it is.
    own = model.state_dict()
    same = tensors.keys() == own.keys() and all(tensors[name].shape == own[name].shape for name in own)
    described = replace(about, calibrate_images=0).header() if same else {}
    save_tensors(tensors, file, {"format": "pt"} | described)
    config = _config(model, about.architecture, description)
    write_text(file.with_name("config.json"), json.dumps(config, indent=1) + "\n")


def timm_tensors(model: DeepViT) -> dict[str, Tensor]:
    """Return the tensors as timm has them.

    Its registers have positions, which are zero here, and its norm after a mean is named fc_norm.
    """
    tensors = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    if model.reg_token is not None:
        cls, patches = tensors["pos_embed"].tensor_split([model.num_class_tokens], dim=1)
        tensors["pos_embed"] = torch.cat([cls, torch.zeros_like(tensors["reg_token"]), patches], dim=1)
    if model.pool == Pool.mean_patches and isinstance(model.norm, nn.LayerNorm):
        for part in ("weight", "bias"):
            tensors[f"fc_norm.{part}"] = tensors.pop(f"norm.{part}")
    return tensors


def _config(model: DeepViT, architecture: Architecture, description: dict[str, Any]) -> dict[str, Any]:
    shape, known = architecture.model, model.pretrained_cfg
    global_pool, fc_norm = POOLS[shape.pool]
    arguments = {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "embed_dim": shape.dim,
        "depth": shape.depth,
        "num_heads": shape.heads,
        "mlp_ratio": shape.mlp_ratio,
        "act_layer": shape.act.value,
        "qkv_bias": shape.qkv_bias,
        "qk_norm": shape.qk_norm,
        "class_token": shape.class_token,
        "final_norm": shape.final_norm,
        "init_values": shape.layer_scale,
        "reg_tokens": shape.registers,
        "global_pool": global_pool,
        "fc_norm": fc_norm,
    }
    return {
        "architecture": "vit_base_patch16_224",  # every size of it is replaced by model_args
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": global_pool,
        "model_args": arguments,
        "pretrained_cfg": {
            **{name: known[name] for name in PRETRAINED},
            "num_classes": model.num_classes,
            "pool_size": None,
            "label_names": description["classes"],
        },
        "deepvit_train": description,
    }
