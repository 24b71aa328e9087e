"""Translate the older tensor names of vit-pytorch's DeepViT, when Residual(PreNorm(...)) wrapped each branch.

They are transformer.layers.i.0.fn.norm.*, transformer.layers.i.0.fn.fn.{to_qkv, reattn_weights,
reattn_norm.1, to_out.0}.*, transformer.layers.i.1.fn.norm.*, transformer.layers.i.1.fn.fn.net.{0, 3}.*; the
rest is as today. In the earliest versions the stem is one Linear, to_patch_embedding.1.
"""

from __future__ import annotations

import math

from einops import rearrange

from deepvit_train.models.importer import vit_pytorch
from deepvit_train.models.importer.layout import Layout, Tensors

RULES = (
    *vit_pytorch.COMMON,
    (r"transformer\.layers\.(\d+)\.0\.fn\.norm\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.fn\.to_qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.fn\.reattn_weights", r"blocks.\1.attn.theta"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.fn\.reattn_norm\.1\.(\w+)", r"blocks.\1.attn.norm.\2"),
    (r"transformer\.layers\.(\d+)\.0\.fn\.fn\.to_out\.0\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"transformer\.layers\.(\d+)\.1\.fn\.norm\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.0\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer\.layers\.(\d+)\.1\.fn\.fn\.net\.3\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
)


def _with_conv_stem(tensors: Tensors) -> Tensors:
    """Turn the stem of the earliest versions, a Linear on patches (p1 p2 c), into the same convolution."""
    weight = tensors.get("patch_embed.norm1.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] % 3 or "patch_embed.proj.weight" in tensors:
        return tensors
    patch = math.isqrt(weight.shape[1] // 3)
    if 3 * patch**2 != weight.shape[1]:
        return tensors
    renamed = {
        name.replace("patch_embed.norm1", "patch_embed.proj"): value for name, value in tensors.items()
    }
    kernel = rearrange(weight, "d (p1 p2 c) -> d c p1 p2", p1=patch, p2=patch)
    return renamed | {"patch_embed.proj.weight": kernel}


LAYOUT = Layout(
    "the older vit-pytorch's", r"^transformer\.layers\.\d+\.0\.fn\.", RULES, 1e-5, _with_conv_stem
)
