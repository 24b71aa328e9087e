"""`deepvit-convert`: a weights file of any known layout as one that says itself what its model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from deepvit_train.atomic import new_folder
from deepvit_train.config.command import ConvertConfig
from deepvit_train.config.preset import Architecture, plain_from
from deepvit_train.console import console
from deepvit_train.error import OutputError
from deepvit_train.models.importer import Imported, import_model
from deepvit_train.models.summary import count_parameters
from deepvit_train.run import checkpoint
from deepvit_train.run.checkpoint import DESCRIPTION, FORMAT, WEIGHT_FILES


def run(config: ConvertConfig) -> dict[str, Any]:
    """Write out/model.safetensors with its description; a JSON object is the last line on stdout.

    Raises CheckpointError for a source that can't be read or is in doubt, OutputError for a folder that holds
    something already or can't be written.
    """
    file = checkpoint.find_weights(config.source, config.weights.value)
    imported = import_model(file, config.preset, config.weights.value, config.said())
    statistics = checkpoint.calibrated_beside(file) or {}
    imported.model.load_state_dict(statistics, strict=False)
    written = _write(Path(config.out).expanduser(), imported, calibrated=bool(statistics))
    parameters = count_parameters(imported.model)
    console.print(
        f"{file}: {imported.layout} layout, {imported.source.weights} weights, {parameters:,} parameters"
    )
    for line in _told(imported.architecture):
        console.print(line)
    console.print(f"written: {written}")
    report = {
        "out": str(written),
        "layout": imported.layout,
        "weights": imported.source.weights,
        "parameters": parameters,
        "classes": imported.model.num_classes,
    }
    print(json.dumps(report), flush=True)
    return report


def _write(out: Path, imported: Imported, calibrated: bool) -> Path:
    """The weights file, in its folder."""
    name = f"{WEIGHT_FILES['live']}.safetensors"
    header = {DESCRIPTION: json.dumps(_description(imported, calibrated), sort_keys=True)}
    with new_folder(out) as folder:
        try:
            save_file(imported.model.state_dict(), folder / name, metadata=header)
        except SafetensorError as error:
            raise OutputError(f"out={out}: can't be written ({error})") from None
    return out / name


def _description(imported: Imported, calibrated: bool) -> dict[str, Any]:
    """What the file says about itself. Class names and data are known of this project's own files only."""
    source = imported.source.description or {}
    return {
        "format": FORMAT,
        "model": plain_from(imported.architecture.model) | {"weights": None},
        "attn": plain_from(imported.architecture.attn),
        "classes": source.get("classes"),
        "data": source.get("data"),
        "seed": source.get("seed", 0),
        # The weights hold calibrated statistics now, or what their own program left: none are measured.
        "calibrate_images": 0 if calibrated else source.get("calibrate_images", 0),
    }


def _told(architecture: Architecture) -> list[str]:
    """What was found in the tensors, and what no tensor shows, so that a wrong guess is seen."""
    model, attn = architecture.model, architecture.attn
    mixing = (
        "no block mixes its heads"
        if attn.kind == "self"
        else f"blocks from {attn.from_block} on mix ({attn.kind})"
    )
    return [
        f"from the tensors: {model.image_size} px, patch {model.patch_size}, {model.stem} stem, "
        f"dim {model.dim}, {model.depth} blocks, {model.heads} heads, "
        f"mlp_ratio {model.mlp_ratio:g}; {mixing}",
        f"not in the tensors: pool={model.pool} transform_scale={attn.transform_scale} "
        f"residual_scale={model.residual_scale:g} norm_eps={model.norm_eps:g} mean={model.mean} "
        f"std={model.std} crop_pct={model.crop_pct:g} interpolation={model.interpolation}",
    ]
