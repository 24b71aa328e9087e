"""A model back from a checkpoint or a weights file, with all that evaluating it needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit_train import checkpoint
from deepvit_train.calibration import Statistics, reattention_norms
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.models import DeepViT, build_model
from deepvit_train.schema.data import DataConfig, DataName
from deepvit_train.schema.model import AttentionConfig, ModelConfig
from deepvit_train.schema.preset import Architecture, plain_from, section_from
from deepvit_train.state import WEIGHT_FILES, load_weights, read_calibrated


@dataclass(frozen=True)
class LoadedModel:
    """A model with what it was trained on."""

    file: Path
    weights: str  # 'live' or 'ema'
    model: DeepViT
    architecture: Architecture
    classes: list[str]
    data: DataName
    data_root: str | None  # where the data set was in training; unknown for a weights file on its own
    seed: int
    calibrate_images: int
    statistics: Statistics | None

    @property
    def needs_calibration(self) -> bool:
        """Whether the model normalises by running statistics, which mislead, and nothing better is stored."""
        return self.statistics is None and self.calibrate_images > 0 and bool(reattention_norms(self.model))


def load(path: str, weights: str) -> LoadedModel:
    """The model of a run, checkpoint folder or weights file. Raises CheckpointError.

    Args:
        path: what `checkpoint=` was given.
        weights: 'live', 'ema', or 'auto' for the averaged weights where there are any.
    """
    found = checkpoint.find(path)
    file, weights = (found, _kind_of(found)) if found.is_file() else _file_in(found, weights)
    description = checkpoint.read_description(file)
    try:
        architecture = Architecture(
            section_from(ModelConfig, description["model"]),
            section_from(AttentionConfig, description["attn"]),
        )
        loaded = LoadedModel(
            file=file,
            weights=weights,
            model=build_model(architecture, len(description["classes"])),
            architecture=architecture,
            classes=[str(name) for name in description["classes"]],
            data=DataName(description["data"]),
            data_root=_data_root_beside(file),
            seed=int(description["seed"]),
            calibrate_images=int(description["calibrate_images"]),
            statistics=_statistics_beside(file, weights),
        )
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its description can't be used ({error})") from None
    load_weights(loaded.model, file)
    return loaded


def _file_in(folder: Path, weights: str) -> tuple[Path, str]:
    present = {name: folder / f"{stem}.safetensors" for name, stem in WEIGHT_FILES.items()}
    if weights == "auto":
        weights = "ema" if present["ema"].exists() else "live"
    if not present[weights].exists():
        raise CheckpointError(f"{folder}: holds no {weights} weights; nearest: weights=auto")
    return present[weights], weights


def _kind_of(file: Path) -> str:
    return "ema" if file.stem == WEIGHT_FILES["ema"] else "live"


def _in_checkpoint(file: Path) -> bool:
    return (file.parent / checkpoint.MANIFEST).exists()


def _statistics_beside(file: Path, weights: str) -> Statistics | None:
    return read_calibrated(file.parent).get(weights) if _in_checkpoint(file) else None


def _data_root_beside(file: Path) -> str | None:
    root = checkpoint.read_state(file.parent).get("data_root") if _in_checkpoint(file) else None
    return None if root is None else str(root)


def result_file(loaded: LoadedModel, split: str) -> Path:
    """Where an evaluation is written: beside the checkpoint's folder, or beside a weights file of its own."""
    subject = loaded.file.parent.resolve() if _in_checkpoint(loaded.file) else loaded.file
    return subject.with_name(f"{subject.name}.{loaded.weights}.{split}.json")


def description_of(
    model: ModelConfig,
    attn: AttentionConfig,
    classes: list[str],
    data: DataConfig,
    seed: int,
    calibrate_images: int,
) -> dict[str, Any]:
    """What a weights file says about its model, for `load`. It names no folder of the machine it was trained
    on: equal runs write equal files wherever they ran.
    """
    return {
        "format": checkpoint.FORMAT,
        "model": plain_from(model),
        "attn": plain_from(attn),
        "classes": classes,
        "data": str(data.name),
        "seed": seed,
        "calibrate_images": calibrate_images,
    }
