"""Build models from weights files of this project, of the authors, of vit-pytorch and of timm."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepvit_train.classes import ORDERS, read_names
from deepvit_train.config.preset import Architecture, model_preset
from deepvit_train.console import amount
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.importer import authors, npz, older_vit_pytorch, own, timm_vit, vit_pytorch
from deepvit_train.models.importer.file import Source, read_source
from deepvit_train.models.importer.form import depth_of
from deepvit_train.models.importer.infer import channels_of, checked_choices, infer_architecture
from deepvit_train.models.importer.layout import Layout, Tensors, Translated
from deepvit_train.models.importer.timm_cache import PREFIX
from deepvit_train.models.importer.timm_name import timm_architecture
from deepvit_train.run.description import ModelDescription
from deepvit_train.run.found import Found, find
from deepvit_train.run.tensor import check_finite, check_fit, listed

# A file has the first of these layouts that matches one of its names.
LAYOUTS = (
    own.LAYOUT,
    older_vit_pytorch.LAYOUT,
    vit_pytorch.LAYOUT,
    authors.LAYOUT,
    timm_vit.LAYOUT,
    npz.LAYOUT,
)


@dataclass(frozen=True)
class Imported:
    """A model from a weights file, and what is known about it.

    Args:
        weights: 'live' or 'ema'.
        layout: name of the layout of the file's tensors.
        model: the model, in evaluation mode.
        description: what the file says about the model, changed by the caller's choices. For a file of
            another program it holds the architecture and the order of classes alone.
        described: whether the file says what its model is, as those of this project do.
        left_out: names of the file's tensors that the model has no use for.
    """

    weights: str
    layout: str
    model: DeepViT
    description: ModelDescription
    described: bool
    left_out: list[str]


def load_model(
    path: str | Path,
    preset: str | None = None,
    weights: str = "auto",
    download: bool = False,
    **overrides: Any,
) -> DeepViT:
    """Load the model of a weights file, a checkpoint or a run, in evaluation mode.

    It has `class_names`, `preprocessing` and `transform`, which turns an image into what the model takes.

    A file of this project describes its model. In a file of another program the tensors show every size, the
    stem, and which blocks mix their heads. What they do not show comes from `overrides`, else from `preset`,
    else from the defaults of that program. Double precision is kept. Nothing in a file is ever executed.

    Args:
        path: safetensors, what torch.save wrote, or Google's .npz; with this project's names, the authors',
            vit-pytorch's, or those that timm reads; or hf:ORG/NAME[@REVISION] of the Hugging Face hub,
            safetensors alone.
        preset: name of a model preset, 'deepvit_s', or of a model of timm, 'timm:vit_base_patch16_clip_224'.
        weights: 'live', 'ema', or 'auto' for the averaged weights where there are any.
        download: whether hf:ORG/NAME is fetched where it is not in the hub's cache.
        overrides: heads, transform_scale, residual_scale, act, pool, norm_eps, dropout, emb_dropout,
            drop_path, mean, std, crop_pct, interpolation; classes, a file of names, one a line.

    Raises:
        CheckpointError: the file is damaged, has no known layout, does not fit its model (the names are
            listed), or needs one of the overrides.
        ConfigError: an override or the preset does not exist.
        DataError: the file of names can't be read, or does not fit.
    """
    found = find(str(path), weights, download=download)
    model = import_model(found, preset, weights, overrides).model
    model.load_state_dict(found.calibrated(model) or {}, strict=False)
    return model


def import_model(found: Found, preset: str | None, weights: str, overrides: dict[str, Any]) -> Imported:
    """Build the model of a weights file that was found. Arguments and errors are those of `load_model`.

    `overrides` may also hold 'classes': a file of their names, or an order. Raises DataError for that file.
    """
    said = overrides.get("classes")
    choices = checked_choices({name: value for name, value in overrides.items() if name != "classes"})
    named = preset is not None and preset.startswith(PREFIX)
    base = None
    if preset is not None:
        base = timm_architecture(preset.removeprefix(PREFIX)) if named else model_preset(preset)
    source = read_source(found, weights)
    try:
        translated = own_tensors(source)
        layout, tensors = translated.layout, translated.tensors
        if source.description is not None:
            description = _changed(source.description, choices)
        else:
            choices = with_shown(translated, choices, base if named else None)
            description = ModelDescription(infer_architecture(tensors, layout.norm_eps, base, choices))
        model = build_from(description.architecture, tensors)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{found.file}: {error}") from None
    names, order = class_names(source, layout, said, model.num_classes)
    description = replace(description, classes=names, class_order=order)
    model.class_names = names
    if description.value_range is not None:
        model.value_range = (description.value_range[0], description.value_range[1])
    described = source.description is not None
    return Imported(source.weights, layout.name, model, description, described, translated.left_out)


def with_shown(translated: Translated, choices: dict[str, Any], named: Architecture | None) -> dict[str, Any]:
    """Return what the caller says of another program's file, with what its layout shows.

    Raises CheckpointError where the two contradict each other, or leave something open.
    """
    heads = translated.shown.get("heads")
    if heads is not None:
        said = choices.get("heads", heads if named is None else named.model.heads)
        if said != heads:
            raise CheckpointError(f"heads={said}, but the file has {amount(heads, 'head')}")
        choices = choices | {"heads": heads}
    if translated.layout in (timm_vit.LAYOUT, npz.LAYOUT):
        return timm_vit.checked_choices_of_timm(translated, choices, named)
    return choices


def class_names(
    source: Source, layout: Layout, said: str | None, outputs: int
) -> tuple[list[str] | None, str | None]:
    """What is known of a file's classes: their names by output; else the order of names they are taken in.

    Args:
        said: what the caller says, before the file: a file of names, or an order.

    Raises DataError where the names are not as many as the outputs.
    """
    if said in ORDERS:
        return None, said
    if said is not None:
        return read_names(said, outputs), None
    description = source.description
    if description is not None and description.classes is not None:
        if outputs and len(description.classes) != outputs:
            raise CheckpointError(
                f"describes {amount(len(description.classes), 'class', 'classes')}, but "
                f"the model has {amount(outputs, 'output')}"
            )
        return description.classes, None
    return None, (description and description.class_order) or layout.class_order


def build_from(architecture: Architecture, tensors: Tensors) -> DeepViT:
    """Build the model of an architecture with these tensors, in evaluation mode.

    It allocates memory only after every name and shape has been found right, so that a file can't claim
    more than it holds.

    Raises:
        CheckpointError: the tensors do not fit the architecture, or hold NaN or infinity.
    """
    if architecture.model.depth != depth_of(tensors):
        raise CheckpointError(
            f"is described with {amount(architecture.model.depth, 'block')}, but holds {depth_of(tensors)}"
        )
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    double = all(tensor.dtype == torch.float64 for tensor in tensors.values() if tensor.is_floating_point())
    with torch.device("meta"):
        model = DeepViT(architecture, classes, channels_of(tensors))
    expected = model.state_dict()
    check_fit(expected, tensors)
    check_finite(tensors)
    for name, tensor in tensors.items():
        kind = torch.float64 if double and tensor.is_floating_point() else expected[name].dtype
        expected[name] = tensor.to(kind, copy=True).contiguous()
    model.load_state_dict(expected, assign=True)
    return model.eval()


def own_tensors(source: Source) -> Translated:
    """Return a file's tensors under this project's names, its layout, and what was left out.

    Raises CheckpointError for a file of no known layout, or with tensors that its layout does not know.
    """
    if source.description is not None:
        return Translated(source.tensors, [], {}, own.LAYOUT)
    names = list(source.tensors)
    layout = next((layout for layout in LAYOUTS if layout.matches(names)), None)
    if layout is None:
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise CheckpointError(
            f"has no layout that can be read (these can: {known}); {listed('it holds', names)}"
        )
    translated, unread = layout.translate(source.tensors)
    if unread:
        raise CheckpointError(f"has {layout.name} layout, but some tensors are {listed('not read', unread)}")
    return replace(translated, left_out=[*source.left_out, *translated.left_out])


def left_out_note(names: list[str]) -> str:
    """Return a line on the parts of a file that its model has no use for: heads, decoders, text towers."""
    parts = dict.fromkeys(re.sub(r"\.\d+\..*|\.(weight|bias)$", "", name) for name in names)
    second = any(name.startswith("head_dist.") for name in names)
    more = "; timm averages the answers of head and head_dist, here head answers alone" if second else ""
    return listed(f"left out, {amount(len(names), 'tensor')} of", parts) + more


def _changed(description: ModelDescription, choices: dict[str, Any]) -> ModelDescription:
    """Return the description with the caller's choices in it. Raises CheckpointError for other heads."""
    model, attn = description.architecture.model, description.architecture.attn
    if choices.get("heads", model.heads) != model.heads:
        described = amount(model.heads, "head")
        raise CheckpointError(f"heads={choices['heads']}, but the file is described with {described}")
    scale = choices.get("transform_scale", attn.transform_scale)
    said = {name: value for name, value in choices.items() if name not in ("heads", "transform_scale")}
    architecture = Architecture(replace(model, **said), replace(attn, transform_scale=scale))
    return replace(description, architecture=architecture)
