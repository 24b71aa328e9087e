"""Initial weights for a model: resampled where of another size, with a fresh head or Theta where needed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from timm.layers import resample_abs_pos_embed, resample_patch_embed

from deepvit_train.config.model import Pool
from deepvit_train.error import CheckpointError
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.importer import check_fit, own_tensors, timm_vit
from deepvit_train.models.importer.file import Source, read_source
from deepvit_train.models.importer.layout import Tensors
from deepvit_train.run.checkpoint import find
from deepvit_train.run.description import ModelDescription

# What a block has only where it mixes its heads.
OF_THETA = re.compile(r"(blocks\.\d+\.)attn\.(?:theta|theta_bias|logit_theta|logit_bias|norm\..+)")


@dataclass(frozen=True)
class Start:
    """Where a model's initial weights came from, and what they did not hold."""

    file: Path
    layout: str
    notes: list[str]

    def __str__(self) -> str:
        return "; ".join([f"initial weights: {self.file} ({self.layout} layout)", *self.notes])


def start_from(model: DeepViT, path: str) -> Start:
    """Load a model's weights from a file of any known layout, a checkpoint or a run; averaged ones if any.

    Position embeddings and patch kernels of another size are resampled. The classifier stays fresh where the
    number of classes differs, and Theta with its norm where the file's attention is plain. All else must be
    there, in the model's shape.

    Raises:
        CheckpointError: as `load_model`; where heads are known to differ; where something else is missing,
            left over or of another shape, naming it. The model is then as it was.
    """
    found = find(path, key="model.weights")
    source = read_source(found)
    notes: list[str] = []
    try:
        layout, tensors, _ = own_tensors(source)
        tensors = tensors | (found.calibrated() or {})
        _check_heads(model, source.description)
        _check_pool(model, source)
        expected = model.state_dict()
        for adapt in (_head, _positions, _patches, _theta):
            tensors = adapt(expected, tensors, notes)
        check_fit(expected, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"model.weights={path}: {error}") from None
    model.load_state_dict(tensors)
    return Start(found.file, layout, notes)


def _check_heads(model: DeepViT, description: ModelDescription | None) -> None:
    heads = model.heads if description is None else description.architecture.model.heads
    if heads != model.heads:
        raise CheckpointError(f"is of {heads} heads, not model.heads={model.heads}")


def _check_pool(model: DeepViT, source: Source) -> None:
    """Refuse the norm that timm puts after the mean of the patches for a head that reads something else."""
    if timm_vit.NORM_AFTER_MEAN in source.tensors and model.pool != Pool.mean_patches:
        raise CheckpointError(
            f"its head reads the mean of the patches (fc_norm), not model.pool={model.pool}; nearest: "
            "model.pool=mean_patches"
        )


def _head(expected: Tensors, tensors: Tensors, notes: list[str]) -> Tensors:
    own, given = (len(each["head.weight"]) if "head.weight" in each else 0 for each in (expected, tensors))
    if own == given:
        return tensors
    notes.append(f"fresh head of {own} classes, not {given}")
    kept = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    return kept | {name: value for name, value in expected.items() if name.startswith("head.")}


def _positions(expected: Tensors, tensors: Tensors, notes: list[str]) -> Tensors:
    given, own = tensors.get("pos_embed"), expected["pos_embed"]
    if given is None or given.ndim != 3 or given.shape[1] == own.shape[1]:
        return tensors
    new, old = math.isqrt(own.shape[1] - 1), math.isqrt(given.shape[1] - 1)
    if old**2 != given.shape[1] - 1 or not old:
        return tensors
    notes.append(f"positions resampled from {old}x{old} to {new}x{new}")
    return tensors | {"pos_embed": resample_abs_pos_embed(given, [new, new], [old, old])}


def _patches(expected: Tensors, tensors: Tensors, notes: list[str]) -> Tensors:
    name = "patch_embed.proj.weight"
    given, own = tensors.get(name), expected[name]
    if given is None or given.ndim != 4 or own.ndim != 4 or given.shape[2:] == own.shape[2:]:
        return tensors
    new, old = ([int(side) for side in each.shape[2:]] for each in (own, given))
    notes.append(f"patch kernels resampled from {old[0]}x{old[1]} to {new[0]}x{new[1]}")
    return tensors | {name: resample_patch_embed(given, new)}


def _theta(expected: Tensors, tensors: Tensors, notes: list[str]) -> Tensors:
    own, given = (
        {name: match[1] for name in each if (match := OF_THETA.fullmatch(name))}
        for each in (expected, tensors)
    )
    blocks = {name[: name.index(".", 7) + 1] for name in tensors if name.startswith("blocks.")}
    plain = {name: expected[name] for name, block in own.items() if block in blocks - set(given.values())}
    if plain and given:
        raise CheckpointError("its blocks that mix their heads are others than attn.from_block says")
    if plain:
        notes.append(f"fresh Theta in {len(set(own.values()))} blocks")
    return tensors | plain
