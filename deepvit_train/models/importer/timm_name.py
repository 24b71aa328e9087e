"""Say what architecture a model of timm has, by its name: `preset=timm:NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from deepvit_train.config.model import ModelConfig, Pool, mlp_ratio_of
from deepvit_train.config.preset import Architecture, attention_preset, section_from
from deepvit_train.error import ConfigError, nearest
from deepvit_train.models.block import ACTS
from deepvit_train.models.importer.timm_cache import PREFIX
from deepvit_train.models.keyword import UNSAID

ACT_OF = {layer: act for act, layer in ACTS.items()}


def timm_architecture(name: str) -> Architecture:
    """Return the architecture of timm's model of a name, 'vit_small_patch16_224', with or without '.TAG'.

    Raises ConfigError for a name that timm does not know, and for a model that can't be built here.
    """
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except RuntimeError:
        raise ConfigError(
            f"preset={PREFIX}{name}: timm has no such model{nearest(name, timm.list_models())}"
        ) from None
    if problems := list(differences(model)):
        raise ConfigError(f"preset={PREFIX}{name}: can't be built here: {'; '.join(problems)}")
    return architecture_of(model)


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture of a model of timm in which `differences` finds nothing."""
    assert isinstance(model, VisionTransformer)
    return Architecture(section_from(ModelConfig, _values(model)), attention_preset("self"))


def differences(model: nn.Module) -> Iterator[str]:
    """Yield what a model of timm has that a model of this project can't have."""
    if not isinstance(model, VisionTransformer):
        yield f"it is a {type(model).__name__}, not a VisionTransformer"
        return
    embed = model.patch_embed
    if type(embed) is not PatchEmbed:
        yield f"its stem is a {type(embed).__name__}"
    elif not isinstance(embed.norm, nn.Identity):
        yield "its stem ends in a norm"
    elif len(set(embed.grid_size)) > 1 or len(set(embed.patch_size)) > 1:
        yield "its images or patches are not square"
    if model.pos_embed is None:
        yield "it has no position embeddings"
    if model.global_pool not in ("token", "avg"):
        yield f"its head reads an attention pool (global_pool={model.global_pool})"
    elif model.global_pool == "avg" and model.pool_include_prefix:
        yield "its mean includes registers"
    yield from _of_blocks(model)
    norms = {type(norm) for norm in _norms(model)}
    if others := sorted(norm.__name__ for norm in norms if not issubclass(norm, nn.LayerNorm)):
        yield f"its norms are {', '.join(others)}"
    elif len({norm.eps for norm in _norms(model)}) > 1:
        yield "its norms have several epsilons"


def _of_blocks(model: VisionTransformer) -> Iterator[str]:
    block: Any = model.blocks[0]
    if len({str(each) for each in model.blocks}) > 1 and len({type(each) for each in model.blocks}) > 1:
        yield "its blocks are of several kinds"
    elif type(block) is not Block:
        yield f"its blocks are {type(block).__name__}"
    elif type(block.attn) is not Attention:
        yield f"its attention is {type(block.attn).__name__}"
    elif not isinstance(block.attn.norm, nn.Identity) or getattr(block.attn, "gate", None) is not None:
        yield "its attention has a norm or a gate after the values"
    elif type(block.mlp) is not Mlp:
        yield f"its MLP is a {type(block.mlp).__name__}"
    elif not isinstance(block.mlp.norm, nn.Identity):
        yield "its MLP has a norm inside"
    elif type(block.mlp.act) not in ACT_OF:
        yield f"its activation is {type(block.mlp.act).__name__}"
    elif block.attn.proj.bias is None or block.mlp.fc1.bias is None:
        yield "its projections have no bias"


def _norms(model: VisionTransformer) -> list[Any]:
    """Return the norms of the parts that are built here."""
    block: Any = model.blocks[0]
    parts = [model.norm_pre, model.norm, model.fc_norm, getattr(block, "norm1", None)]
    parts += [getattr(getattr(block, "attn", None), name, None) for name in ("q_norm", "k_norm")]
    return [part for part in parts if part is not None and not isinstance(part, nn.Identity)]


def _values(model: VisionTransformer) -> dict[str, Any]:
    """Return the keys of `model` in the configuration."""
    block: Any = model.blocks[0]
    dim, expected = model.embed_dim, resolve_data_config({}, model=model)
    second = isinstance(model, VisionTransformerDistilled)
    pool = Pool.cls
    if model.global_pool == "avg":
        pool = Pool.mean_patches if isinstance(model.norm, nn.Identity) else Pool.mean_normed_patches
    head_dim = block.attn.head_dim
    return UNSAID | {
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "stem": "conv",
        "dim": dim,
        "depth": len(model.blocks),
        "heads": block.attn.num_heads,
        "head_dim": None if block.attn.num_heads * head_dim == dim else head_dim,
        "mlp_ratio": mlp_ratio_of(block.mlp.fc1.out_features, dim),
        "act": ACT_OF[type(block.mlp.act)].value,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "class_token": model.cls_token is not None,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not all(isinstance(norm, nn.Identity) for norm in (model.norm, model.fc_norm)),
        "pool": pool.value,
        "layer_scale": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "registers": model.num_reg_tokens + second,
        "norm_eps": _norms(model)[0].eps,
        "init": "vit",
        "mean": list(expected["mean"]),
        "std": list(expected["std"]),
        "crop_pct": expected["crop_pct"],
        "interpolation": expected["interpolation"],
    }
