"""Counts how many images a model gets right.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit_train.config.recipe import Precision
from deepvit_train.console import counted
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError
from deepvit_train.evaluation.prediction import Recorder
from deepvit_train.precision import autocast


@dataclass(frozen=True)
class EvalResult:
    """The outcome of an evaluation, in which every image counted once. Accuracies are shares from 0 to 1.

    Args:
        class_accuracy: None for a class without images.
        not_finite: images for which the model's outputs were NaN or infinite. They count as wrong.
    """

    top1: float
    top5: float
    loss: float
    images: int
    images_per_s: float
    class_accuracy: list[float | None]
    class_images: list[int]
    not_finite: int = 0

    @property
    def mean_class(self) -> float:
        """The mean over classes of the accuracy in each. Classes without images are left out."""
        found = [share for share in self.class_accuracy if share is not None]
        return sum(found) / len(found)

    def scalars(self) -> dict[str, float]:
        """Return the figures that are logged during training."""
        figures = {
            "top1": self.top1,
            "top5": self.top5,
            "mean_class": self.mean_class,
            "loss": self.loss,
        }
        return figures | ({"not_finite": self.not_finite} if self.not_finite else {})


def top5_tells(classes: int) -> bool:
    """Return whether top-5 accuracy says anything: of five classes or fewer every answer is among five."""
    return classes > 5


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    world: World,
    precision: Precision,
    classes: int,
    absent: Sequence[int] = (),
    recorder: Recorder | None = None,
) -> EvalResult:
    """Measure top-1 and top-5 accuracy and mean cross-entropy over the batches of all ranks.

    Raises DataError for an image that can't be read, because an evaluation never replaces one. The model's
    mode is put back afterwards.

    Args:
        classes: how many outputs the model has.
        absent: outputs that are left out, as if the model had none for these classes.
        recorder: is given what the model says of each image.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(3, classes, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    left_out = torch.tensor(absent, device=world.device) if absent else None
    not_finite = torch.zeros((), dtype=torch.int64, device=world.device)
    bad: list[str] = []
    start = time.perf_counter()
    with counted(batches, "evaluation", world.is_main) as shown:
        for batch in shown:
            bad += batch.bad
            if bad and world.size == 1:
                break
            if bad:
                continue  # nothing counts any more, but other ranks may wait for this one at every batch
            with autocast(world.device, precision):
                logits = model(batch.images)
            logits = logits.float()
            if left_out is not None:
                logits = logits.index_fill(1, left_out, -torch.inf)
            loss += F.cross_entropy(logits, batch.targets, reduction="sum").double()
            finite = logits.amax(dim=1).isfinite()
            not_finite += (~finite).sum()
            likeliest = logits.topk(min(5, logits.shape[1])).indices
            _count(likeliest, batch.targets, finite, counts)
            if recorder is not None:
                recorder.add(logits, batch.targets, likeliest[:, 0], finite)
    model.train(was_training)
    if world.any(len(bad)):
        raise DataError(
            f"{bad[0] if bad else 'another rank'}: can't be read, and an evaluation replaces no image"
        )
    world.sum(counts)
    world.sum(loss)
    world.sum(not_finite)
    images, top1, top5 = counts.sum(dim=1).tolist()
    return EvalResult(
        top1=top1 / images,
        top5=top5 / images,
        loss=float(loss) / images,
        images=images,
        images_per_s=images / (time.perf_counter() - start),
        class_accuracy=[hits / seen if seen else None for seen, hits in counts[:2].T.tolist()],
        class_images=counts[0].tolist(),
        not_finite=int(not_finite),
    )


def _count(likeliest: Tensor, targets: Tensor, finite: Tensor, counts: Tensor) -> None:
    """Add a batch to the counts of images, top-1 hits and top-5 hits by class.

    Args:
        likeliest: the classes of the largest logits in order, (B, 5), or (B, C) if C is less.
        targets: (B,), int64.
        finite: (B,), bool. Where it is false, the order of the logits means nothing.
        counts: (3, C), int64, changed in place.
    """
    hits = likeliest == targets[:, None]
    hits &= finite[:, None]
    one = torch.ones_like(targets)
    counts[0].index_add_(0, targets, one)
    counts[1].index_add_(0, targets, hits[:, 0].to(one.dtype))
    counts[2].index_add_(0, targets, hits.any(dim=1).to(one.dtype))
