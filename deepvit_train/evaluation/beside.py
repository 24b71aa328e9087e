"""What config.json beside a weights file says of its model, in the form that timm writes for the hub.

It may be a stranger's, so it is read as data of a bounded size, and what does not look right is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepvit_train.config.model import Interpolation, Pool
from deepvit_train.error import CheckpointError
from deepvit_train.models.importer.timm_cache import heads_of
from deepvit_train.reading import ContentError, parse_json, read_bytes
from deepvit_train.run.hub import CONFIG, LARGEST

# What timm calls the pooling, and what it is called here if there is no norm after the mean.
POOLS = {"token": Pool.cls, "avg": Pool.mean_normed_patches}


@dataclass(frozen=True)
class Beside:
    """What is said of a model.

    Args:
        choices: what the tensors do not show, as the overrides of `load_model` name it.
        classes: the names of the outputs, in order; None if they are not said.
    """

    choices: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None


def read_beside(file: Path) -> Beside:
    """Return what config.json in a weights file's folder says; nothing where there is no such file of timm's.

    Raises CheckpointError for one that is too large or is not JSON.
    """
    path = file.parent / CONFIG
    if not path.is_file():
        return Beside()
    try:
        content = parse_json(read_bytes(path, LARGEST[CONFIG], follow=True))
    except ContentError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        return Beside()
    trained = _dict(content.get("pretrained_cfg"))
    arguments = _dict(content.get("model_args"))
    said = {
        "heads": arguments.get("num_heads", heads_of(content["architecture"])),
        "mean": trained.get("mean"),
        "std": trained.get("std"),
        "crop_pct": trained.get("crop_pct"),
        "interpolation": trained.get("interpolation"),
    }
    choices = {name: value for name, value in said.items() if _fits(name, value)}
    pool = arguments.get("global_pool", content.get("global_pool"))
    if isinstance(pool, str) and pool in POOLS and not arguments.get("fc_norm"):
        choices["pool"] = POOLS[pool]
    if "interpolation" in choices:
        choices["interpolation"] = Interpolation(choices["interpolation"])
    return Beside(choices, _names(trained.get("label_names", content.get("label_names"))))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _fits(name: str, value: Any) -> bool:
    """Return whether a value is of the kind that its name has. Its bounds are checked with the model's."""
    if name == "heads":
        return type(value) is int
    if name in ("mean", "std"):
        return (
            isinstance(value, list) and len(value) == 3 and all(type(each) in (int, float) for each in value)
        )
    if name == "crop_pct":
        return type(value) in (int, float)
    return value in list(Interpolation)


def _names(value: Any) -> list[str] | None:
    named = isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
    return value if named else None
