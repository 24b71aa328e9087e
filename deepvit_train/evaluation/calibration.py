"""Recomputes the statistics of re-attention's BatchNorms for the weights as they are.

While the learning rate is high, running statistics lag behind the weights so far that a good model evaluates
as garbage (docs/log.md has figures). So before each evaluation the statistics are measured on a fixed set of
training images. They are kept beside the model: its running statistics, part of the training state, are not
touched.

Shapes: H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepvit_train.config.recipe import Precision
from deepvit_train.console import counted
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.world import World
from deepvit_train.models import DeepViT, ReAttention
from deepvit_train.precision import autocast

# By their names in the model's state dict: `blocks.0.attn.norm.running_mean` (H,), `...running_var` (H,).
Statistics = dict[str, Tensor]


def reattention_norms(model: DeepViT) -> dict[str, nn.BatchNorm2d]:
    """Return the BatchNorms of the mixing blocks by name. The result is empty if there are none.

    Frozen blocks are left out: they keep the statistics they were trained with.
    """
    frozen = {module for part in model.frozen for module in part.modules()}
    return {
        f"{name}.norm": module.norm
        for name, module in model.named_modules()
        if isinstance(module, ReAttention)
        and isinstance(module.norm, nn.BatchNorm2d)
        and module not in frozen
    }


@torch.no_grad()
def calibrate(model: DeepViT, batches: Iterable[Batch], precision: Precision, world: World) -> Statistics:
    """Measure the mean and variance of every re-attention BatchNorm, averaged over images and ranks.

    Each batch is normalised by its own statistics on its way through the model; all else is as in evaluation.
    Afterwards the model, its mode and its running statistics are as before.
    """
    images = torch.zeros((), dtype=torch.float64, device=world.device)
    sums = {
        name: torch.zeros_like(value, dtype=torch.float64) for name, value in statistics_of(model).items()
    }
    with _measuring(model), counted(batches, "calibration", world.is_main) as shown:
        for batch in shown:
            with autocast(world.device, precision):
                model.forward_features(batch.images)
            images += len(batch.images)
            for name, value in statistics_of(model).items():
                sums[name] += value.double() * len(batch.images)
    world.sum(images)
    return {name: (world.sum(total) / images).float() for name, total in sums.items()}


@contextmanager
def _measuring(model: DeepViT) -> Iterator[None]:
    """Let the running statistics become those of each batch, while all else is in evaluation mode."""
    modes = {module: module.training for module in model.modules()}
    norms = list(reattention_norms(model).values())
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum, norm.num_batches_tracked = 1.0, torch.tensor(0)
    try:
        with using(model, None):
            yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
        for module, training in modes.items():
            module.training = training


@contextmanager
def using(model: DeepViT, statistics: Statistics | None) -> Iterator[None]:
    """Let re-attention normalise by these statistics inside, and by the model's own again afterwards."""
    before = statistics_of(model)
    _write(model, statistics or {})
    try:
        yield
    finally:
        _write(model, before)


def statistics_of(model: DeepViT) -> Statistics:
    """Copy the running statistics of every re-attention BatchNorm."""
    found = {}
    for name, norm in reattention_norms(model).items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        found[f"{name}.running_mean"] = norm.running_mean.clone()
        found[f"{name}.running_var"] = norm.running_var.clone()
    return found


def _write(model: DeepViT, statistics: Statistics) -> None:
    buffers = dict(model.named_buffers())
    for name, value in statistics.items():
        buffers[name].copy_(value)
