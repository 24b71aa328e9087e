"""Recognise this project's tensor names in a file without the description that its checkpoints carry."""

from __future__ import annotations

from deepvit_train.models.importer.layout import Layout

LAYOUT = Layout(
    "deepvit-train's", r"\.attn\.(theta|norm\.|lambda_)|^patch_embed\.norm1\.", ((r"(.+)", r"\1"),), None
)
