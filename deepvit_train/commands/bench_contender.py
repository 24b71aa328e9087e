"""Build the models that deepvit-bench compares, all of one shape."""

from __future__ import annotations

from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deepvit_train.config.bench import FORMULA, BenchConfig
from deepvit_train.config.model import ModelConfig
from deepvit_train.config.preset import Architecture, attention_preset
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT, ReAttention
from deepvit_train.models.reattention import plain_reattention


def build_contender(name: str, config: BenchConfig, model: ModelConfig) -> nn.Module:
    """Build a contender with fresh weights, by its name in the configuration.

    Raises ConfigError if timm or vit-pytorch has no model of this shape or is not installed, and for a
    formula of an attention that does not use the operator of re-attention.
    """
    if name == "timm":
        return _timm(model, config.classes)
    if name == "vit_pytorch":
        return _vit_pytorch(model, config.classes)
    preset = name.removesuffix(FORMULA)
    attn = config.attn if preset == "configured" else attention_preset(preset)
    built = DeepViT(Architecture(model, attn), config.classes)
    if name.endswith(FORMULA):
        for module in built.modules():
            if not isinstance(module, ReAttention):
                continue
            if type(module).attend is not ReAttention.attend:
                raise ConfigError(f"contenders: {name!r} is unknown: {preset} does not use the operator")
            module.attend = partial(_attend_by_formula, module)
    return built


def _attend_by_formula(attention: ReAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    dropout = attention.attn_dropout if attention.training else 0.0
    return plain_reattention(q, k, v, attention.head_mixer, dropout=dropout)


def _timm(model: ModelConfig, classes: int) -> nn.Module:
    if model.width_of_head * model.heads != model.dim:
        raise ConfigError(
            f"model.head_dim={model.head_dim}: the heads of timm's ViT are model.dim / model.heads wide; "
            "take timm out of contenders"
        )
    return VisionTransformer(
        img_size=model.image_size,
        patch_size=model.patch_size,
        num_classes=classes,
        embed_dim=model.dim,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        qkv_bias=model.qkv_bias,
        drop_path_rate=model.drop_path,
    )


def _vit_pytorch(model: ModelConfig, classes: int) -> nn.Module:
    try:
        from vit_pytorch.deepvit import DeepViT as VitPytorch
    except ImportError:
        raise ConfigError(
            "contenders: vit_pytorch is not installed: pip install vit-pytorch, or leave it out"
        ) from None
    return VitPytorch(
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_classes=classes,
        dim=model.dim,
        depth=model.depth,
        heads=model.heads,
        mlp_dim=model.mlp_dim,
        dim_head=model.width_of_head,
        pool=model.pool.value,
    )
