"""Accuracy by ReaL's labels: those that people gave ImageNet's validation images later, often several each.

Source: Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159. The labels come with timm. An image that
nobody could label is left out.

Shapes: B batch, C the model's outputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import RealLabelsImagenet

from deepvit_train.config.recipe import Precision
from deepvit_train.console import counted
from deepvit_train.data.dataset import Batch
from deepvit_train.data.imagenet import imagenet_classes
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError
from deepvit_train.precision import autocast

IMAGES = 50_000
NAME = re.compile(r"ILSVRC2012_val_(\d{8})", re.ASCII)


@dataclass(frozen=True)
class RealResult:
    """Shares of the labelled images whose likeliest class, or one of the five likeliest, is a label."""

    top1: float
    top5: float
    images: int
    unlabelled: int


def real_labels(paths: Sequence[str]) -> list[list[int]]:
    """Return the labels of images by their files' names, as numbers of ImageNet's classes.

    Raises DataError for a file that is not named as ImageNet's validation images are.
    """
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, IMAGES + 1)]
    known = RealLabelsImagenet(names).real_labels
    found = []
    for path in paths:
        match = NAME.match(Path(path).name)
        labels = known.get(f"{match[0]}.JPEG") if match else None
        if labels is None:
            raise DataError(
                f"{path}: not named as ImageNet's validation images, ILSVRC2012_val_00000001.JPEG"
            )
        found.append(labels)
    return found


@torch.no_grad()
def evaluate_real(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    labels: Sequence[Sequence[int]],
    outputs: Sequence[str],
    world: World,
    precision: Precision,
) -> RealResult:
    """Count the images for which a model names one of their labels.

    Args:
        batches: their targets are the images' numbers, those of `labels`.
        labels: of each image, as numbers of ImageNet's classes.
        outputs: the class of each of the model's outputs, all of them ImageNet's.

    Raises DataError for an image that can't be read.
    """
    number_of = {name: number for number, name in enumerate(imagenet_classes())}
    numbers = torch.tensor([number_of[name] for name in outputs], device=world.device)
    counts, bad = torch.zeros(4, dtype=torch.int64, device=world.device), []
    was_training = model.training
    model.eval()
    with counted(batches, "ReaL", world.is_main) as shown:
        for batch in shown:
            bad += batch.bad
            if bad:
                continue  # other ranks may wait for this one
            with autocast(world.device, precision):
                logits = model(batch.images).float()
            likeliest = numbers[logits.topk(5).indices].tolist()
            finite = logits.amax(dim=1).isfinite().tolist()
            for image, guesses, sound in zip(batch.targets.tolist(), likeliest, finite, strict=True):
                right = [sound and guess in labels[image] for guess in guesses]
                counts += torch.tensor(
                    [bool(labels[image]), right[0], any(right), not labels[image]], device=world.device
                )
    model.train(was_training)
    if world.any(len(bad)):
        raise DataError(
            f"{bad[0] if bad else 'another rank'}: can't be read, and an evaluation replaces no image"
        )
    images, top1, top5, unlabelled = world.sum(counts).tolist()
    if not images:
        raise DataError("ReaL has no label for any of these images")
    return RealResult(top1 / images, top5 / images, images, unlabelled)
