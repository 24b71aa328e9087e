"""`deepvit-convert` turns a weights file of any known layout into one that says what its model is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from deepvit_train.atomic import new_folder
from deepvit_train.classes import shortened
from deepvit_train.commands.convert_average import average_with
from deepvit_train.config.convert import ConvertConfig
from deepvit_train.config.preset import Architecture
from deepvit_train.console import amount, console, print_report
from deepvit_train.error import OutputError
from deepvit_train.evaluation.loaded import import_found
from deepvit_train.models.importer import Imported, left_out_note
from deepvit_train.models.summary import count_parameters
from deepvit_train.run.checkpoint import WEIGHT_FILES
from deepvit_train.run.found import find
from deepvit_train.run.saving import save_tensors


def run(config: ConvertConfig) -> dict[str, Any]:
    """Write out/model.safetensors with its description. The last line on stdout is a JSON object.

    Raises CheckpointError for a source that can't be read or is in doubt, OutputError for a folder that holds
    something already or can't be written.
    """
    found = find(config.source, config.weights.value, key="source", download=config.download)
    imported, _ = import_found(found, config.preset, config.weights.value, config.said())
    if config.average:
        imported, statistics = average_with(config, found, imported)
    else:
        statistics = found.calibrated(imported.model) or {}
    imported.model.load_state_dict(statistics, strict=False)
    written = _write(Path(config.out).expanduser(), imported, calibrated=bool(statistics))
    parameters = count_parameters(imported.model)
    console.print(
        f"{found.file}: {imported.layout} layout, {imported.weights} weights, {parameters:,} parameters"
    )
    if imported.left_out:
        console.print(left_out_note(imported.left_out))
    for line in [*_told(imported.description.architecture), _told_of_classes(imported)]:
        console.print(line)
    console.print(f"written: {written}")
    report = {
        "out": str(written),
        "layout": imported.layout,
        "weights": imported.weights,
        "parameters": parameters,
        "classes": imported.model.num_classes,
        "left_out": imported.left_out,
        "average_of": 1 + len(config.average),
    }
    print_report(report)
    return report


def _write(out: Path, imported: Imported, calibrated: bool) -> Path:
    """Write the weights file into its folder and return it."""
    name, description = f"{WEIGHT_FILES['live']}.safetensors", imported.description
    if calibrated:  # the weights hold calibrated statistics now, so nobody needs to measure them
        description = replace(description, calibrate_images=0)
    with new_folder(out) as folder:
        try:
            save_tensors(imported.model.state_dict(), folder / name, description.header())
        except SafetensorError as error:
            raise OutputError(f"out={out}: can't be written ({error})") from None
    return out / name


def _told(architecture: Architecture) -> list[str]:
    """Describe what the tensors show, and what was assumed because no tensor shows it."""
    model, attn = architecture.model, architecture.attn
    mixing = (
        "no block mixes its heads"
        if attn.kind == "self"
        else f"blocks from {attn.first} on mix ({attn.kind})"
    )
    return [
        f"from the tensors: {model.image_size} px, patch {model.patch_size}, {model.stem} stem, "
        f"dim {model.dim}, {amount(model.depth, 'block')}, {amount(model.heads, 'head')}, "
        f"mlp_ratio {model.mlp_ratio:g}; {mixing}",
        f"not in the tensors: pool={model.pool} act={model.act} transform_scale={attn.transform_scale} "
        f"residual_scale={model.residual_scale:g} norm_eps={model.norm_eps:g} mean={model.mean} "
        f"std={model.std} crop_pct={model.crop_pct:g} interpolation={model.interpolation}",
    ]


def _told_of_classes(imported: Imported) -> str:
    """Say by what the outputs will be matched to a data set's classes."""
    names, order = imported.description.classes, imported.description.class_order
    if names is not None:
        return f"classes: {shortened(names)}"
    return f"classes: not named; {order}'s order of a data set's folders is assumed (classes=FILE names them)"
