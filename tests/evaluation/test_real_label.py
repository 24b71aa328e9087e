"""Accuracy by ReaL's labels is what timm counts."""

from __future__ import annotations

import pytest
import torch
from timm.data import RealLabelsImagenet

from deepvit_train.config.recipe import Precision
from deepvit_train.data.dataset import Batch
from deepvit_train.data.imagenet import imagenet_classes
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError
from deepvit_train.evaluation.real_label import IMAGES, evaluate_real, real_labels

WORLD = World(0, 1, torch.device("cpu"))
NAMES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, IMAGES + 1)]


class Lookup(torch.nn.Module):
    """Answers with the logits that an image names by its value."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[images.long().flatten()]


def _batches(count: int, size: int) -> list[Batch]:
    numbers = torch.arange(count)
    return [Batch(part.view(-1, 1).float(), part, []) for part in numbers.split(size)]


@pytest.mark.slow
def test_all_images_as_timm_counts_them() -> None:
    torch.manual_seed(0)
    counter = RealLabelsImagenet(NAMES)
    logits = torch.randn(IMAGES, 1000)
    for image, name in enumerate(NAMES[: IMAGES // 2]):
        logits[image, counter.real_labels[name][:1]] += 4  # half of the images are mostly right
    counter.add_result(logits)
    found = evaluate_real(
        Lookup(logits), _batches(IMAGES, 1000), real_labels(NAMES), imagenet_classes(), WORLD, Precision.fp32
    )
    assert 100 * found.top1 == pytest.approx(counter.get_accuracy(1))
    assert 100 * found.top5 == pytest.approx(counter.get_accuracy(5))
    assert 0.1 < found.top1 < found.top5 < 0.9
    assert (found.images, found.unlabelled) == (46_837, 3_163)  # the paper's numbers


def test_outputs_may_have_another_order_and_files_another_ending() -> None:
    names = imagenet_classes()
    paths = ["/x/n01440764/ILSVRC2012_val_00000002.png", "ILSVRC2012_val_00000003.JPEG"]
    labels = real_labels(paths)
    assert labels == [RealLabelsImagenet(NAMES).real_labels[NAMES[place]] for place in (1, 2)]
    outputs = names[::-1]
    logits = torch.zeros(2, 1000)
    for image in range(2):
        logits[image, 999 - labels[image][0]] = 1
    found = evaluate_real(Lookup(logits), _batches(2, 2), labels, outputs, WORLD, Precision.fp32)
    assert (found.top1, found.images) == (1.0, 2)
    wrong = evaluate_real(Lookup(logits), _batches(2, 2), labels, names, WORLD, Precision.fp32)
    assert wrong.top1 == 0.0


def test_outputs_that_are_not_finite_are_wrong() -> None:
    labels = [[0], [0]]
    logits = torch.zeros(2, 1000)
    logits[:, 0] = 1
    logits[1, 5] = torch.nan
    found = evaluate_real(Lookup(logits), _batches(2, 2), labels, imagenet_classes(), WORLD, Precision.fp32)
    assert (found.top1, found.top5) == (0.5, 0.5)


def test_files_that_are_named_otherwise_and_images_that_are_bad() -> None:
    with pytest.raises(DataError, match=r"cat\.jpg: not named as ImageNet's validation images"):
        real_labels(["val/n01440764/cat.jpg"])
    with pytest.raises(DataError, match="not named"):
        real_labels(["ILSVRC2012_val_00050001.JPEG"])
    batch = Batch(torch.zeros(1, 1), torch.tensor([-1]), ["a.jpg: broken"])
    with pytest.raises(DataError, match=r"a\.jpg: broken"):
        evaluate_real(Lookup(torch.zeros(1, 1000)), [batch], [[0]], imagenet_classes(), WORLD, Precision.fp32)
    with pytest.raises(DataError, match="no label"):
        evaluate_real(
            Lookup(torch.zeros(1, 1000)), _batches(1, 1), [[]], imagenet_classes(), WORLD, Precision.fp32
        )
