"""Turn vit-pytorch's keywords into an architecture, with defaults for what nobody gives."""

from __future__ import annotations

from typing import Any

from deepvit_train.config.model import AttentionConfig, ModelConfig, mlp_ratio_of
from deepvit_train.config.preset import Architecture, attention_preset, section_from
from deepvit_train.error import ConfigError, nearest

# The keys of `model` that neither sizes nor tensors show, with their defaults: no dropout, no scales, and the
# preprocessing of the authors.
UNSAID: dict[str, Any] = {
    "pool": "cls",
    "act": "gelu",
    "final_norm": True,
    "dropout": 0.0,
    "emb_dropout": 0.0,
    "drop_path": 0.0,
    "residual_scale": 1.0,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "weights": None,
}
# Every key of vit-pytorch's DeepViT except its sizes.
VIT_PYTORCH: dict[str, Any] = UNSAID | {
    "stem": "rearrange",
    "head_dim": 64,
    "qkv_bias": False,
    "qk_norm": False,
    "class_token": True,
    "pre_norm": False,
    "layer_scale": None,
    "registers": 0,
    "norm_eps": 1e-5,
    "init": "vit_pytorch",
}


def vit_pytorch_architecture(
    *,
    image_size: int,
    patch_size: int,
    dim: int,
    depth: int,
    heads: int,
    mlp_dim: int,
    attn: str | AttentionConfig = "reattention_vit_pytorch",
    **others: Any,
) -> Architecture:
    """Return the architecture of vit-pytorch's DeepViT with these keywords.

    Args:
        image_size, patch_size: sides of image and patch, pixels; the patch divides the image.
        dim, depth, heads, mlp_dim: widths and counts; dim need not be a multiple of heads.
        attn: the name of a shipped attention (`attn=` on the command line), or an AttentionConfig.
        others: vit-pytorch's pool, dim_head, dropout and emb_dropout, or any key of `model`.

    Raises:
        ConfigError: (a ValueError) a keyword does not exist, or a value is out of bounds.
        TypeError: a size is missing.
    """
    values = {
        "image_size": image_size,
        "patch_size": patch_size,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": mlp_ratio_of(mlp_dim, max(1, dim)),  # ModelConfig refuses a dim of 0 below
    }
    for name, value in others.items():
        key = "head_dim" if name == "dim_head" else name
        if key not in VIT_PYTORCH:
            known = ["dim_head", "mlp_dim", *values, *VIT_PYTORCH]
            raise ConfigError(f"{name}: no such keyword{nearest(name, known)}")
        values[key] = value
    return Architecture(
        section_from(ModelConfig, VIT_PYTORCH | values),
        attention_preset(attn) if isinstance(attn, str) else attn,
    )
