"""The mean of several models' weights (Wortsman et al., arXiv 2203.05482), with statistics measured anew."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deepvit_train.config.convert import ConvertConfig
from deepvit_train.config.model import Init, ThetaInit
from deepvit_train.config.preset import Architecture
from deepvit_train.config.recipe import Precision
from deepvit_train.console import amount, console
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed.world import World, choose_device
from deepvit_train.error import CheckpointError
from deepvit_train.evaluation.calibration import Statistics, reattention_norms
from deepvit_train.evaluation.loaded import LoadedModel, import_found, measure_statistics
from deepvit_train.models.importer import Imported
from deepvit_train.run.found import Found, find
from deepvit_train.run.tensor import check_fit

CALIBRATE_IMAGES = 512  # where no description says how many: a run's default


def average_with(config: ConvertConfig, found: Found, source: Imported) -> tuple[Imported, Statistics]:
    """Return the mean of source and the models of `average`, with calibrated statistics where they matter.

    The statistics are empty for a model without BatchNorm over maps, and where the training images are not
    known: then the file says that they are to be measured.

    Raises CheckpointError for weights of another shape or other classes, and what calibration raises.
    """
    states = [source.model.state_dict(), *(_state(config, path, source) for path in config.average)]
    source.model.load_state_dict(mean_of(states))
    console.print(f"mean of {amount(len(states), 'model')}")
    if not reattention_norms(source.model):
        return source, {}
    images = source.description.calibrate_images or CALIBRATE_IMAGES
    source = replace(source, description=replace(source.description, calibrate_images=images))
    loaded = LoadedModel(
        found, source.weights, source.model, source.description, None, source.described, [], source.left_out
    )
    if config.data.name is None and source.description.data is None:
        console.print(
            "BatchNorm over maps is not calibrated, because the training images are not known: give "
            "data.root=FOLDER, or deepvit-eval measures its statistics on those that it is given"
        )
        return source, {}
    data = loaded.data_for(config.data)
    device = choose_device(config.device.value)
    source.model.to(device)
    loaders = Loaders(source.model.preprocessing, data, World(rank=0, size=1, device=device))
    statistics = measure_statistics(loaded, loaders, config.batch_size, Precision.fp32, console.print)
    console.print(f"BatchNorm over maps: calibrated on {amount(images, 'training image')}")
    source.model.to("cpu")
    return source, {name: value.cpu() for name, value in statistics.items()}


def mean_of(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each tensor, taken in double precision. Counters are those of the first state."""
    return {
        name: torch.stack([state[name].double() for state in states]).mean(dim=0).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def _state(config: ConvertConfig, path: str, source: Imported) -> dict[str, Tensor]:
    """Read the tensors of a model to average with. Raises CheckpointError if they are not of one kind."""
    found = find(path, config.weights.value, key="average", download=config.download)
    other, _ = import_found(found, config.preset, config.weights.value, config.said())
    names, others = source.description.classes, other.description.classes
    if names != others and None not in (names, others):
        raise CheckpointError(
            f"average={path}: has other classes than source={config.source}, or another order"
        )
    if _computed(other) != _computed(source):
        raise CheckpointError(
            f"average={path}: is a model of another architecture than source={config.source}"
        )
    try:
        check_fit(source.model.state_dict(), other.model.state_dict())
    except CheckpointError as error:
        raise CheckpointError(f"average={path}: {error}") from None
    return other.model.state_dict()


def _computed(imported: Imported) -> Architecture:
    """Return an architecture without what plays no part in evaluation: dropout, and how weights started."""
    model, attn = imported.description.architecture.model, imported.description.architecture.attn
    still = replace(model, dropout=0.0, emb_dropout=0.0, drop_path=0.0, init=Init.vit, weights=None)
    return Architecture(
        still, replace(attn, dropout=None, theta_init=ThetaInit.random, theta_frozen=False, qk_gain=1.0)
    )
