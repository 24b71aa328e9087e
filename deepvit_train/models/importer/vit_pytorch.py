"""Translate the tensor names of vit-pytorch's DeepViT as it is today.

They are pos_embedding, cls_token, to_patch_embedding.{1, 2, 3}.*, transformer.layers.i.0.{norm, to_qkv,
reattn_weights, reattn_norm.1, to_out.0}.*, transformer.layers.i.1.net.{0, 1, 4}.*, mlp_head.{0, 1}.*
"""

from __future__ import annotations

from deepvit_train.models.importer.layout import Layout

# The rules that all versions of vit-pytorch share.
COMMON = (
    (r"pos_embedding", r"pos_embed"),
    (r"cls_token", r"cls_token"),
    (r"to_patch_embedding\.1\.(\w+)", r"patch_embed.norm1.\1"),
    (r"to_patch_embedding\.2\.(\w+)", r"patch_embed.proj.\1"),
    (r"to_patch_embedding\.3\.(\w+)", r"patch_embed.norm2.\1"),
    (r"mlp_head\.0\.(\w+)", r"norm.\1"),
    (r"mlp_head\.1\.(\w+)", r"head.\1"),
)
RULES = (
    *COMMON,
    (r"transformer\.layers\.(\d+)\.0\.norm\.(\w+)", r"blocks.\1.norm1.\2"),
    (r"transformer\.layers\.(\d+)\.0\.to_qkv\.(\w+)", r"blocks.\1.attn.qkv.\2"),
    (r"transformer\.layers\.(\d+)\.0\.reattn_weights", r"blocks.\1.attn.theta"),
    (r"transformer\.layers\.(\d+)\.0\.reattn_norm\.1\.(\w+)", r"blocks.\1.attn.norm.\2"),
    (r"transformer\.layers\.(\d+)\.0\.to_out\.0\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"transformer\.layers\.(\d+)\.1\.net\.0\.(\w+)", r"blocks.\1.norm2.\2"),
    (r"transformer\.layers\.(\d+)\.1\.net\.1\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (r"transformer\.layers\.(\d+)\.1\.net\.4\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
)

LAYOUT = Layout("vit-pytorch's", r"^transformer\.layers\.\d+\.0\.reattn_weights$", RULES, 1e-5)
