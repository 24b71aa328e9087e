"""Give a model initial weights: resample those of another size, and keep fresh what the file lacks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from deepvit_train.classes import TORCHVISION, difference, ordered, shortened
from deepvit_train.config.model import Pool
from deepvit_train.config.preset import model_preset
from deepvit_train.console import amount
from deepvit_train.error import CheckpointError
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.importer import class_names, left_out_note, own_tensors, timm_cache, timm_vit
from deepvit_train.models.importer.file import read_source
from deepvit_train.models.importer.form import preset_of_shape, presets_of_shape
from deepvit_train.models.importer.layout import Tensors, Translated
from deepvit_train.run.description import ModelDescription
from deepvit_train.run.found import find
from deepvit_train.run.tensor import check_finite, check_fit

# The tensors of an attention, of which a plain one has those of qkv and proj alone.
OF_ATTENTION = re.compile(r"(blocks\.\d+\.)attn\.((?!qkv\.|proj\.|q_norm\.|k_norm\.).+)")


@dataclass(frozen=True)
class Start:
    """The file of a model's initial weights, its layout, and notes on what was resampled or stayed fresh.

    `warnings` are of images that the model gets otherwise than the weights did.
    """

    file: Path
    layout: str
    notes: list[str]
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = "; ".join([f"initial weights: {self.file} ({self.layout} layout)", *self.notes])
        return "\n".join([told, *(f"warning: {each}" for each in self.warnings)])


def start_from(
    model: DeepViT,
    path: str,
    classes: list[str] | None = None,
    said: str | None = None,
    download: bool = False,
) -> Start:
    """Load initial weights into a model, from a file of any known layout, a checkpoint or a run.

    Averaged weights are preferred. Position embeddings and patch kernels of another size are resampled. The
    classifier stays fresh if the classes are others, and what an attention has besides qkv and proj if the
    file's attention is plain. Everything else must be there, in the model's shapes.

    Args:
        path: the file; timm:NAME for the weights of timm's model of that name in timm's cache; or hf:ORG/NAME
            for those of a repository in the hub's cache.
        classes: the names of the model's outputs, in order. The rows of the classifier are matched to them.
            None: they are not known, and the rows are taken as they are.
        said: what the caller says of the file's classes: a file of their names, or an order.
        download: whether timm:NAME or hf:ORG/NAME may be fetched where it is not in the cache.

    Raises:
        DataError: a file of names can't be used.
        CheckpointError: the file can't be read (see `load_model`), its number of heads is known to differ, or
            a tensor is missing, left over or of another shape. The model is then unchanged.
    """
    name = path.removeprefix(timm_cache.PREFIX) if path.startswith(timm_cache.PREFIX) else None
    notes: list[str] = []
    try:
        file = path if name is None else str(timm_cache.weights_file(name, download))
    except CheckpointError as error:
        raise CheckpointError(f"model.weights={path}: {error}") from None
    found = find(file, key="model.weights", download=download)
    source = read_source(found)
    try:
        translated = own_tensors(source)
        layout, tensors = translated.layout, translated.tensors
        if translated.left_out:
            notes.append(left_out_note(translated.left_out))
        tensors = tensors | (found.calibrated() or {})
        if classes is not None:
            names, order = class_names(source, layout, said, _outputs(tensors))
            tensors = _rows_by_name(model, tensors, classes, names, order or TORCHVISION, notes)
        name = name or _architecture_beside(found.file)
        _check_width(model, translated.tensors)
        _check_heads(model, source.description, name, translated)
        _check_pool(model, translated)
        asks = translated.shown.get(timm_vit.ASKS)
        if asks is not None and not (name or "").startswith("deit3"):
            raise CheckpointError(
                f"{asks}; nearest: model.weights=DIR after deepvit-convert preset=timm:NAME"
            )
        expected = model.state_dict()
        for adapt in (_head, _positions, _patches, _attention):
            tensors = adapt(expected, tensors, notes)
        check_fit(expected, tensors)
        check_finite(tensors)
        warnings = list(_other_ranges(model, name))
    except CheckpointError as error:
        raise CheckpointError(f"model.weights={path}: {error}") from None
    model.load_state_dict(tensors)
    return Start(found.file, layout.name, notes, warnings)


def _check_width(model: DeepViT, tensors: Tensors) -> None:
    """Refuse tensors of another width, and name the preset that has it."""
    given = tensors["pos_embed"].shape[-1] if "pos_embed" in tensors else model.embed_dim
    if given == model.embed_dim:
        return
    presets = presets_of_shape(tensors)
    # Of presets of one shape the one whose images have the same range as the model's.
    presets.sort(key=lambda name: tuple(model_preset(name).model.mean) != tuple(model.pretrained_cfg["mean"]))
    near = f"model={presets[0]}" if presets else f"model.dim={given}"
    raise CheckpointError(f"has width {given}, not model.dim={model.embed_dim}; nearest: {near}")


def _check_heads(
    model: DeepViT, description: ModelDescription | None, name: str | None, translated: Translated
) -> None:
    """Refuse another number of heads: no tensor of a plain attention shows it, and any number would load."""
    how = ""
    if description is not None:
        heads = description.architecture.model.heads
    elif "heads" in translated.shown:
        heads = translated.shown["heads"]
    elif name is not None:
        heads, how = timm_cache.heads_of(name) or model.heads, f", as timm's {name}"
    else:
        preset, heads = preset_of_shape(translated.tensors) or ("", model.heads)
        how = f", as model={preset}, which has its shape (deepvit-convert heads={model.heads} says otherwise)"
    if heads != model.heads:
        raise CheckpointError(
            f"has {amount(heads, 'head')}{how}, not model.heads={model.heads}; nearest: model.heads={heads}"
        )


def _architecture_beside(file: Path) -> str | None:
    """Return the name of timm's model in config.json beside a file, as the Hugging Face hub has it."""
    try:
        name = json.loads((file.parent / "config.json").read_text())["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _other_ranges(model: DeepViT, name: str | None) -> Iterator[str]:
    """Say where timm's weights were trained on images of another mean or deviation than the model gets."""
    trained = None if name is None else timm_cache.known(name)
    for key in ("mean", "std"):
        given, own = getattr(trained, key, None), tuple(model.pretrained_cfg[key])
        if given is not None and tuple(given) != own:
            listed = ",".join(f"{value:g}" for value in given)
            yield f"the initial weights were trained with model.{key}=[{listed}], not {list(own)}"


def _check_pool(model: DeepViT, translated: Translated) -> None:
    """Refuse the norm that timm puts after the mean of the patches for a head that reads something else."""
    if translated.shown.get("pool") == Pool.mean_patches and model.pool != Pool.mean_patches:
        raise CheckpointError(
            f"its head reads the mean of the patches (fc_norm), not model.pool={model.pool}; nearest: "
            "model.pool=mean_patches"
        )


def _head(expected: Tensors, tensors: Tensors, notes: list[str]) -> Tensors:
    own, given = _outputs(expected), _outputs(tensors)
    if own == given:
        return tensors
    other = f"not {given}" if given else "because the file has no head"
    notes.append(f"fresh head of {amount(own, 'class', 'classes')}, {other}")
    return _with_head_of(expected, tensors)


def _outputs(tensors: Tensors) -> int:
    return len(tensors["head.weight"]) if "head.weight" in tensors else 0


def _with_head_of(expected: Tensors, tensors: Tensors) -> Tensors:
    kept = {name: value for name, value in tensors.items() if not name.startswith("head.")}
    return kept | {name: value for name, value in expected.items() if name.startswith("head.")}


def _rows_by_name(
    model: DeepViT,
    tensors: Tensors,
    classes: list[str],
    names: list[str] | None,
    order: str,
    notes: list[str],
) -> Tensors:
    """Give each class its row of the classifier, of a file with as many classes.

    Args:
        classes: the names of the model's outputs.
        names: those of the file's outputs, or None where they are not known and taken in `order`.
    """
    if len(classes) != _outputs(tensors):
        return tensors
    if names is not None and (problem := difference(classes, names)):
        notes.append(f"fresh head: other classes than the file's ({problem})")
        return _with_head_of(model.state_dict(), tensors)
    rows = ordered(classes, order) if names is None else names
    if rows == classes:
        return tensors
    how = f"by name, of which the file's order is {shortened(rows)}"
    if names is None:
        how = (
            f"in {order}'s order of classes ({shortened(rows)}), because the file names none; "
            f"classes={TORCHVISION} takes them as {shortened(classes)}, classes=FILE names them"
        )
    notes.append(f"rows of the head taken {how}")
    places = torch.tensor([rows.index(name) for name in classes])
    return {name: value[places] if name.startswith("head.") else value for name, value in tensors.items()}


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


def _attention(expected: Tensors, tensors: Tensors, notes: list[str]) -> Tensors:
    """Keep the model's own parameters of attention in the blocks where the file's attention is plain."""
    own, given = (
        {name: match for name in each if (match := OF_ATTENTION.fullmatch(name))}
        for each in (expected, tensors)
    )
    blocks = {name[: name.index(".", 7) + 1] for name in tensors if name.startswith("blocks.")}
    mixing = {match[1] for match in given.values()}
    plain = {name: expected[name] for name, match in own.items() if match[1] in blocks - mixing}
    if plain and given:
        raise CheckpointError("does not mix heads in the blocks that attn.from_block says")
    if plain:
        parts = dict.fromkeys(own[name][2] for name in plain)
        count = len({own[name][1] for name in plain})
        notes.append(f"fresh in {amount(count, 'block')}: {', '.join(f'attn.{part}' for part in parts)}")
    return tensors | plain
