"""Models out of weights files: this project's own, the authors', vit-pytorch's, timm's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepvit_train.config.preset import Architecture, model_preset
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.importer import authors, older_vit_pytorch, own, timm_vit, vit_pytorch
from deepvit_train.models.importer.file import Source, listed, read_source
from deepvit_train.models.importer.infer import channels_of, checked_choices, depth_of, infer_architecture
from deepvit_train.models.importer.layout import Tensors
from deepvit_train.run.checkpoint import Found, find
from deepvit_train.run.description import ModelDescription

# The first whose mark a name bears.
LAYOUTS = (own.LAYOUT, older_vit_pytorch.LAYOUT, vit_pytorch.LAYOUT, authors.LAYOUT, timm_vit.LAYOUT)


@dataclass(frozen=True)
class Imported:
    """A model from a weights file, and what is known about it.

    Args:
        weights: 'live' or 'ema'.
        layout: the name of the layout of its tensors.
        description: as the file says, with the caller's choices; of a file of another program, the
            architecture alone is known.
    """

    weights: str
    layout: str
    model: DeepViT
    description: ModelDescription


def load_model(
    path: str | Path, preset: str | None = None, weights: str = "auto", **overrides: Any
) -> DeepViT:
    """The model of a weights file, a checkpoint or a run, in evaluation mode.

    A file of this project says itself what its model is. In any other, the tensors show every size, the stem
    and which blocks mix their heads; what they do not show comes from `overrides`, else from `preset`, else
    it is the default of the program that the layout belongs to. A model of double precision stays one.

    Args:
        path: safetensors or torch.save's, with the authors', vit-pytorch's, timm's or this project's names.
        preset: the name of a model preset: 'deepvit_s'.
        weights: 'live', 'ema', or 'auto' for the averaged weights where there are any.
        overrides: heads, transform_scale, residual_scale, pool, norm_eps, dropout, emb_dropout, drop_path,
            mean, std, crop_pct, interpolation.

    Raises:
        CheckpointError: a file that is damaged, of no layout known, or that needs one of the overrides; names
            missing and left over are listed. Nothing in a file is ever executed.
        ConfigError: an override or preset that does not exist.
    """
    found = find(str(path), weights)
    model = import_model(found, preset, weights, overrides).model
    model.load_state_dict(found.calibrated() or {}, strict=False)
    return model


def import_model(found: Found, preset: str | None, weights: str, overrides: dict[str, Any]) -> Imported:
    """Build the model of a weights file that was found. Arguments and errors are those of `load_model`."""
    choices = checked_choices(overrides)
    base = None if preset is None else model_preset(preset)
    source = read_source(found, weights)
    try:
        layout, tensors, norm_eps = own_tensors(source)
        if source.description is not None:
            description = _changed(source.description, choices)
        else:
            if layout == timm_vit.LAYOUT.name:
                choices = timm_vit.choices_with_pool(choices, source.tensors)
            description = ModelDescription(infer_architecture(tensors, norm_eps, base, choices))
        model = build_from(description.architecture, tensors)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{found.file}: {error}") from None
    return Imported(source.weights, layout, model, description)


def build_from(architecture: Architecture, tensors: Tensors) -> DeepViT:
    """The model of that architecture with these tensors, in evaluation mode. Raises CheckpointError.

    No memory is taken before every name and shape has been found right.
    """
    if architecture.model.depth != depth_of(tensors):
        raise CheckpointError(
            f"described with {architecture.model.depth} blocks, but holds {depth_of(tensors)}"
        )
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    double = all(tensor.dtype == torch.float64 for tensor in tensors.values() if tensor.is_floating_point())
    with torch.device("meta"):
        model = DeepViT(architecture, classes, channels_of(tensors))
    expected = model.state_dict()
    check_fit(expected, tensors)
    for name, tensor in tensors.items():
        kind = torch.float64 if double and tensor.is_floating_point() else expected[name].dtype
        expected[name] = tensor.to(kind, copy=True).contiguous()
    model.load_state_dict(expected, assign=True)
    return model.eval()


def check_fit(expected: Tensors, tensors: Tensors) -> None:
    """Raise CheckpointError listing each name that is missing, left over or of another shape."""
    misfits = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    problems = [
        listed("missing", [name for name in expected if name not in tensors]),
        listed("not read", [name for name in tensors if name not in expected]),
        listed("of another shape", misfits),
    ]
    if any(problems):
        raise CheckpointError(
            f"does not fit the model ({'; '.join(problem for problem in problems if problem)})"
        )


def own_tensors(source: Source) -> tuple[str, Tensors, float | None]:
    """A file's layout, its tensors under own names, the layout's epsilon. Raises CheckpointError."""
    if source.description is not None:
        return own.LAYOUT.name, source.tensors, None
    names = list(source.tensors)
    layout = next((layout for layout in LAYOUTS if layout.matches(names)), None)
    if layout is None:
        known = ", ".join(layout.name for layout in LAYOUTS)
        raise CheckpointError(f"of no layout that can be read ({known}); {listed('it holds', names)}")
    translated, unread = layout.translate(source.tensors)
    if unread:
        raise CheckpointError(f"of {layout.name} layout, but {listed('not read', unread)}")
    return layout.name, translated, layout.norm_eps


def _changed(description: ModelDescription, choices: dict[str, Any]) -> ModelDescription:
    """Put the caller's choices in the place of what a description says."""
    model, attn = description.architecture.model, description.architecture.attn
    if choices.get("heads", model.heads) != model.heads:
        raise CheckpointError(f"heads={choices['heads']}, but it is described with {model.heads}")
    scale = choices.get("transform_scale", attn.transform_scale)
    said = {name: value for name, value in choices.items() if name not in ("heads", "transform_scale")}
    architecture = Architecture(replace(model, **said), replace(attn, transform_scale=scale))
    return replace(description, architecture=architecture)
