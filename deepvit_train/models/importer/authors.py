"""Translate the tensor names of the authors' DeepViT (zhoudaquan/dvit_repo).

They are timm's names, and these: patch_embed.{conv1, bn1, conv2, bn2}.*, and in blocks that mix their heads
blocks.i.attn.reatten_matrix.{weight (H, H, 1, 1), bias (H,)}, blocks.i.attn.var_norm.*
"""

from __future__ import annotations

from deepvit_train.classes import TIMM
from deepvit_train.error import CheckpointError
from deepvit_train.models.importer import timm_vit
from deepvit_train.models.importer.layout import Layout, Tensors

RULES = (
    *timm_vit.RULES,
    (r"patch_embed\.(conv1|conv2|bn1|bn2)\.(\w+)", r"patch_embed.\1.\2"),
    (r"blocks\.(\d+)\.attn\.reatten_matrix\.weight", r"blocks.\1.attn.theta"),
    (r"blocks\.(\d+)\.attn\.reatten_matrix\.bias", r"blocks.\1.attn.theta_bias"),
    (r"blocks\.(\d+)\.attn\.var_norm\.(\w+)", r"blocks.\1.attn.norm.\2"),
)


def _with_theta(tensors: Tensors) -> Tensors:
    """Turn the weights of 1x1 convolutions, (output heads, input heads, 1, 1), into Theta (input, output)."""
    thetas = {name: tensor for name, tensor in tensors.items() if name.endswith(".attn.theta")}
    for name, tensor in thetas.items():
        if tensor.shape[2:] != (1, 1):
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, not a 1x1 convolution's (H, H, 1, 1)"
            )
    return tensors | {name: tensor[:, :, 0, 0].t() for name, tensor in thetas.items()}


# They train with timm's reader of folders.
LAYOUT = Layout("the authors'", r"\.reatten_matrix\.|^patch_embed\.conv1\.", RULES, 1e-6, _with_theta, TIMM)
