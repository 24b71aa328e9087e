"""Load what deepvit-analyze compares: a model, and the same model untrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepvit_train.config.data import DataConfig
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.config.preset import plain_from
from deepvit_train.console import amount
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.evaluation.loaded import LoadedModel, load
from deepvit_train.models import DeepViT
from deepvit_train.models.importer.file import read_source
from deepvit_train.models.importer.timm_model import build_timm_model, check_name, preprocessing_of_timm
from deepvit_train.run.checkpoint import read_state
from deepvit_train.run.found import find

TIMM = "timm:"


@dataclass(frozen=True)
class Subject:
    """A model to be analysed.

    Args:
        label: the name of its run's folder or of its file, for the report.
        description: what analysis.json says about the model.
        model: the model as it was trained.
        fresh: builds the same model untrained, from the seed that its run used.
        preprocessing: what the model expects of its images.
        home: folder of the run, or a folder to make beside the weights file; None without a file.
        loaded: what else a checkpoint says; None for a model of timm.
    """

    label: str
    description: dict[str, Any]
    model: nn.Module
    fresh: Callable[[], nn.Module]
    preprocessing: Preprocessing
    home: Path | None
    loaded: LoadedModel | None

    def states(self, device: torch.device) -> dict[str, nn.Module]:
        """Return the trained and the untrained model, on the device."""
        return {"trained": self.model.to(device), "untrained": self.fresh().to(device)}


def from_checkpoint(
    path: str,
    weights: str,
    preset: str | None,
    said: dict[str, Any],
    key: str = "checkpoint",
    download: bool = False,
) -> Subject:
    """Load a run, a checkpoint or a weights file. Arguments and errors are those of `loaded.load`."""
    loaded = load(path, weights, preset, key, download, **said)
    shape, attn = loaded.architecture.model, loaded.architecture.attn

    def fresh() -> nn.Module:
        torch.manual_seed(loaded.description.seed)
        return DeepViT(loaded.architecture, loaded.model.num_classes)

    home = loaded.found.run or loaded.found.home
    return Subject(
        label=home.name,
        description={
            "shape": f"{attn.kind}, {amount(shape.depth, 'block')}, dim {shape.dim}, "
            f"{amount(shape.heads, 'head')}",
            "evaluated": _evaluated(loaded),
            "checkpoint": str(loaded.found.file),
            "weights": loaded.weights,
            "model": plain_from(shape),
            "attn": plain_from(attn),
        },
        model=loaded.model,
        fresh=fresh,
        preprocessing=shape.preprocessing,
        home=home,
        loaded=loaded,
    )


def _evaluated(loaded: LoadedModel) -> dict[str, Any] | None:
    """Return what the training found these weights to be worth, or None if their checkpoint does not say."""
    state = {} if loaded.found.folder is None else read_state(loaded.found.folder)
    step, metrics = state.get("step"), state.get("metrics", {})
    top1 = metrics.get("val/top1" if loaded.weights == "live" else f"val_{loaded.weights}/top1")
    if top1 is None or state.get("evaluated_step") != step:
        return None
    return {"step": step, "top1": top1, "images": metrics.get("val/images"), "of": metrics.get("val/of")}


def from_timm(name: str, file: str | None, download: bool = False) -> Subject:
    """Build a model of timm, 'timm:NAME'. Without a local weights file it is untrained.

    Raises ConfigError for an unknown name, CheckpointError for a file that does not fit.
    """
    name = name.removeprefix(TIMM)
    check_name(name, f"model={TIMM}{name}")
    found = None if file is None else find(file, download=download)
    tensors = None if found is None else read_source(found).tensors

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build_timm_model(name, tensors, load=False)

    model = fresh()
    if tensors is not None:
        try:
            model = build_timm_model(name, tensors)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint={file}: {error}") from None
    preprocessing = preprocessing_of_timm(model)
    return Subject(
        label=name if file else f"{name}, untrained",
        description={
            "shape": f"timm's {name}",
            "evaluated": None,
            "checkpoint": file,
            "weights": None,
            "model": f"{TIMM}{name}",
            "attn": None,
        },
        model=model,
        fresh=fresh,
        preprocessing=preprocessing,
        home=None if found is None else found.home,
        loaded=None,
    )


def data_of(subject: Subject, given: DataConfig) -> DataConfig:
    """Return the data that was given, or else the data of the subject's run.

    Raises ConfigError if there is neither.
    """
    if subject.loaded is not None:
        return subject.loaded.data_for(given)
    if given.name is None:
        raise ConfigError("data is not given: add data=imagefolder data.root=FOLDER")
    return given
