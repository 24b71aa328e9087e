"""Say of each vision transformer of timm whether its weights are read here, and check those that are.

    python -m scripts.timm_table OUT.json [NAME ...]

Without names it takes all models of timm with "vit" in their names, and those of the files in MODULES. Each
model is made as it is on torch's meta device, to compare all names and shapes, and as a small one with the
same options, whose logits are compared. So are those of the smallest model of each kind, at full size.
Weights are random.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from deepvit_train.config.preset import Architecture, plain_from
from deepvit_train.error import UserError
from deepvit_train.models import DeepViT
from deepvit_train.models.importer import import_model, own_tensors, with_shown
from deepvit_train.models.importer.file import Source
from deepvit_train.models.importer.infer import checked_choices, infer_architecture
from deepvit_train.models.importer.timm_name import timm_architecture
from deepvit_train.run.found import find
from deepvit_train.run.tensor import check_fit

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
# The files of timm with plain vision transformers, and those whose tensors have the same names.
MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "vitamin", "eva", "beit")
LARGEST = 120e6  # parameters of a model that is compared at full size
SIZES = ("image_size", "patch_size", "dim", "depth", "heads", "head_dim", "mlp_ratio", "registers")
UNSEEN = ("mean", "std", "crop_pct", "interpolation", "layer_scale")


def main(out: str, *names: str) -> None:
    """Write what is found of each model, as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    for name in names or vision_transformers():
        rows[name] = row = examined(name)
        print(name, row["taken"], row["reason"] or f"{row['difference']:.1e}", flush=True)
    for name in smallest_of_each_kind(rows):
        rows[name]["full_size_difference"] = difference(name, {})
        print(name, "at full size", rows[name]["full_size_difference"], flush=True)
    Path(out).write_text(json.dumps({"timm": timm.__version__, "models": rows}, indent=1) + "\n")


def vision_transformers() -> list[str]:
    """Return the names of timm's models with vit in their names, and of its vision transformers."""
    named = [name for name in timm.list_models() if "vit" in name]
    return sorted({*named, *(name for module in MODULES for name in timm.list_models(module=module))})


def examined(name: str) -> dict[str, Any]:
    """Return whether a model is taken by its name, the reason if not, and how far its logits are."""
    with torch.device("meta"):
        model = timm.create_model(name)
    row: dict[str, Any] = {"class": type(model).__name__, "taken": False, "reason": None}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["fits_without_a_name"] = fits_without_a_name(model)
    try:
        architecture = timm_architecture(name)
        fits(model, architecture, named=True)
    except UserError as error:
        reason = str(error).split("can't be built here: ")[-1]
        return row | {"reason": reason}
    kind = {key: value for key, value in plain_from(architecture.model).items() if key not in SIZES + UNSEEN}
    kind |= {"registers": architecture.model.registers > 0, "no_embed_class": model.no_embed_class}
    kind |= {"layer_scale": architecture.model.layer_scale is not None}
    return row | {"taken": True, "kind": kind, "difference": difference(name, SMALL)}


def fits(model: nn.Module, architecture: Architecture | None, named: bool, **said: Any) -> None:
    """Compare names and shapes of a model without memory. Raises CheckpointError where they do not fit."""
    translated = own_tensors(Source("live", model.state_dict(), None))
    choices = with_shown(translated, checked_choices(said), architecture if named else None)
    tensors = translated.tensors
    found = infer_architecture(tensors, translated.layout.norm_eps, architecture, choices)
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    with torch.device("meta"):
        check_fit(DeepViT(found, classes).state_dict(), tensors)


def fits_without_a_name(model: nn.Module) -> bool:
    """Return whether its tensors alone look like those of a model here, with heads and activation said."""
    for heads in (4, 3, 1):
        try:
            fits(model, None, False, heads=heads, act="gelu")
        except (UserError, AssertionError):
            continue
        return True
    return False


def difference(name: str, options: dict[str, Any]) -> float:
    """Return the largest difference of logits from timm's, for a model with random weights."""
    torch.manual_seed(0)
    theirs: Any = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    heads = {"heads": options["num_heads"]} if options else {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(theirs.state_dict(), file)
        ours = import_model(find(str(file)), f"timm:{name}", "auto", heads).model
    side = ours.preprocessing.image_size
    with torch.no_grad():
        images = torch.randn(2, 3, side, side)
        expected = theirs(images)
        if hasattr(theirs, "head_dist"):  # the class head alone
            expected = theirs.head(theirs.forward_features(images)[:, 0])
        return float((ours(images) - expected).abs().max() / expected.abs().max())


def smallest_of_each_kind(rows: dict[str, Any]) -> list[str]:
    """Return the smallest of the taken models of each kind, without those that are too large."""
    kinds: dict[str, str] = {}
    for name, row in sorted(rows.items(), key=lambda item: item[1]["parameters"]):
        if row["taken"] and row["parameters"] <= LARGEST:
            kinds.setdefault(json.dumps(row["kind"], sort_keys=True), name)
    return list(kinds.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
