"""Compare an evaluation with what it should equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepvit_train.config.recipe import Precision
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError
from deepvit_train.evaluation.accuracy import evaluate

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)).train()


def batch(size: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, (size,), generator=generator)
    return Batch(torch.randn(size, 3, 8, 8, generator=generator), targets, [])


def test_an_evaluation_counts_every_image_once() -> None:
    model = small_model()
    whole = batch(23)
    with torch.no_grad():
        logits = model.eval()(whole.images)
    model.train()
    for sizes in (1, 5, 23):
        pieces = [
            Batch(images, targets, [])
            for images, targets in zip(whole.images.split(sizes), whole.targets.split(sizes), strict=True)
        ]
        result = evaluate(model, pieces, WORLD, Precision.fp32, classes=3)
        assert result.images == 23
        assert result.top1 == (logits.argmax(1) == whole.targets).double().mean().item()
        assert result.top5 == 1.0
        assert result.loss == pytest.approx(F.cross_entropy(logits, whole.targets).item(), rel=1e-5)
        assert result.class_images == whole.targets.bincount(minlength=3).tolist()
        hits = sum(
            share * images for share, images in zip(result.class_accuracy, result.class_images, strict=True)
        )
        assert hits == pytest.approx(result.top1 * 23)
        assert result.mean_class == pytest.approx(sum(result.class_accuracy) / 3)
        more = evaluate(nn.Sequential(model, nn.Linear(3, 5)), pieces, WORLD, Precision.fp32, classes=5)
        assert more.mean_class == pytest.approx(sum(more.class_accuracy[:3]) / 3)  # two have no images
    assert model.training


def test_an_evaluation_replaces_no_image() -> None:
    whole = batch()
    with pytest.raises(DataError, match=r"x\.png"):
        evaluate(small_model(), [whole._replace(bad=["x.png: truncated"])], WORLD, Precision.fp32, classes=3)
