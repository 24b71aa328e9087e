"""How many images a model gets right."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deepvit_train.config.recipe import Precision
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError
from deepvit_train.precision import autocast


@dataclass(frozen=True)
class EvalResult:
    """An evaluation in which every image counted once. Accuracies are shares from 0 to 1."""

    top1: float
    top5: float
    loss: float
    images: int
    images_per_s: float
    class_accuracy: list[float]
    class_images: list[int]

    def scalars(self) -> dict[str, float]:
        """The figures that are logged over training."""
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}


@torch.no_grad()
def evaluate(
    model: torch.nn.Module, batches: Iterable[Batch], world: World, precision: Precision, classes: int
) -> EvalResult:
    """Top-1 and top-5 accuracy and mean cross-entropy over all ranks. The model's mode is put back after.

    Raises DataError for an image that can't be read: an evaluation never replaces one.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, classes, dtype=torch.int64, device=world.device)  # images, top-1 hits, top-5 hits
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    bad: list[str] = []
    start = time.perf_counter()
    for batch in batches:
        bad += batch.bad
        if bad and world.size == 1:
            break
        if bad:
            continue  # nothing counts any more, but other ranks may wait for this one at every batch
        with autocast(world.device, precision):
            logits = model(batch.images).float()
        loss += F.cross_entropy(logits, batch.targets, reduction="sum").double()
        hits = logits.topk(min(5, classes)).indices == batch.targets[:, None]
        one = torch.ones_like(batch.targets)
        counts[0].index_add_(0, batch.targets, one)
        counts[1].index_add_(0, batch.targets, hits[:, 0].to(one.dtype))
        counts[2].index_add_(0, batch.targets, hits.any(dim=1).to(one.dtype))
    model.train(was_training)
    if world.any(len(bad)):
        raise DataError(
            f"{bad[0] if bad else 'another rank'}: can't be read, and an evaluation replaces no image"
        )
    world.sum(counts)
    world.sum(loss)
    images, top1, top5 = counts.sum(dim=1).tolist()
    return EvalResult(
        top1=top1 / images,
        top5=top5 / images,
        loss=float(loss) / images,
        images=images,
        images_per_s=images / (time.perf_counter() - start),
        class_accuracy=(counts[1] / counts[0].clamp(min=1)).tolist(),
        class_images=counts[0].tolist(),
    )
