"""What a weights file of this project says about its model: JSON in the file's safetensors header."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deepvit_train.classes import ORDERS
from deepvit_train.config.alias import NEWER, NEWER_ATTN
from deepvit_train.config.data import DataName
from deepvit_train.config.model import AttentionConfig, ModelConfig
from deepvit_train.config.preset import Architecture, plain_from, section_from
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.reading import open_file, parse_json
from deepvit_train.run import schema
from deepvit_train.run.schema import misfit

FORMAT = 1
DESCRIPTION = "deepvit_train"  # the key of the safetensors header that holds the JSON


@dataclass(frozen=True)
class ModelDescription:
    """A model, and what it was trained on.

    It names no folder of the machine, so that equal runs write equal files wherever they ran.

    Args:
        architecture: what to build.
        classes: the class names by number, or None if they are not known.
        data: the kind of the data set, or None if it is not known.
        seed: the run's seed.
        calibrate_images: how many training images the BatchNorm statistics are measured on; 0 for a model
            that needs no such measurement.
        class_order: where classes is None, the order of a data set's names that the outputs are taken to be
            in: 'torchvision' or 'timm'.
        value_range: the values of more than 8 bits that were black and white, where the user said so.
    """

    architecture: Architecture
    classes: list[str] | None = None
    data: DataName | None = None
    seed: int = 0
    calibrate_images: int = 0
    class_order: str | None = None
    value_range: list[float] | None = None

    def header(self) -> dict[str, str]:
        """Return the metadata for a safetensors header, which `read_description` reads."""
        content = {
            "format": FORMAT,
            "model": plain_from(self.architecture.model) | {"weights": None},
            "attn": plain_from(self.architecture.attn),
            "classes": self.classes,
            "data": None if self.data is None else self.data.value,
            "seed": self.seed,
            "calibrate_images": self.calibrate_images,
        }
        if self.class_order is not None:  # of a converted file alone
            content["class_order"] = self.class_order
        if self.value_range is not None:
            content["value_range"] = self.value_range
        return {DESCRIPTION: json.dumps(content, sort_keys=True)}


def read_description(file: Path) -> ModelDescription | None:
    """Read the description in a safetensors file. Returns None for a file of another program.

    Raises CheckpointError where the file can't be read, or where its description can't be used.
    """
    try:
        open_file(file, follow=True).close()  # a pipe is refused here
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a weights file that can be read ({error})") from None
    if DESCRIPTION not in header:
        return None
    try:
        return _parsed(parse_json(header[DESCRIPTION]))
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its description can't be used ({error})") from None


def is_described(file: Path) -> bool:
    """Return whether a file is safetensors with a description. Raises CheckpointError if it can't be used."""
    try:
        with open_file(file, follow=True) as opened:
            start = opened.read(9)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror or error})") from None
    return start[8:] == b"{" and read_description(file) is not None


def _parsed(content: Any) -> ModelDescription:
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise ValueError(f"format {content['format']!r}; this version reads {FORMAT}")
    if (problem := misfit(content, schema.DESCRIPTION)) is not None:
        raise ValueError(problem)
    model = section_from(ModelConfig, NEWER | content["model"])
    attn = section_from(AttentionConfig, NEWER_ATTN | content["attn"])
    return ModelDescription(
        architecture=Architecture(model, attn),
        classes=[str(name) for name in content.get("classes") or []] or None,
        class_order=_order(content.get("class_order")),
        data=DataName(content["data"]) if content.get("data") else None,
        seed=int(content.get("seed", 0)),
        calibrate_images=int(content.get("calibrate_images", 0)),
        value_range=[float(value) for value in content.get("value_range") or []] or None,
    )


def _order(order: Any) -> str | None:
    if order not in (None, *ORDERS):
        raise ValueError(f"class_order {order!r}; this version reads {', '.join(ORDERS)}")
    return order
