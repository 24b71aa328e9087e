"""Compare the losses with their formulas in float64 and with torch and timm."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from deepvit_train.config.compose import compose_command
from deepvit_train.config.loss import LossConfig, LossName
from deepvit_train.data.index import ImageIndex
from deepvit_train.error import ConfigError, DataError
from deepvit_train.training.class_weight import class_weights, describe_weights
from deepvit_train.training.loss import Criterion, build_criterion

CLASSES = 5
CPU = torch.device("cpu")


@cache
def usual() -> LossConfig:
    return compose_command("train", []).loss


def criterion(name: str, weights: list[float] | None = None, **keys: float | None) -> Criterion:
    found = build_criterion(replace(usual(), name=LossName(name), **keys), weights, CPU)
    assert found is not None
    return found


def drawn(count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, classes, and soft targets that mix two classes and are smoothed."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, CLASSES, generator=generator, dtype=torch.float64) * 3
    classes = torch.randint(CLASSES, (count,), generator=generator)
    mixed = 0.7 * F.one_hot(classes, CLASSES) + 0.3 * F.one_hot(classes.flip(0), CLASSES)
    return logits, classes, mixed.double() * 0.9 + 0.1 / CLASSES


def shares_of(targets: Tensor, smoothing: float) -> Tensor:
    if targets.is_floating_point():
        return targets
    return F.one_hot(targets, CLASSES) * (1 - smoothing) + smoothing / CLASSES


WEIGHTS = [0.5, 2.0, 1.0, 0.25, 3.0]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_is_its_formula(soft: bool, weights: list[float] | None, gamma: float) -> None:
    logits, classes, mixed = drawn()
    targets = mixed if soft else classes
    found = criterion("focal", weights, focal_gamma=gamma)(logits, targets, 0.1)
    p = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    factor = torch.tensor(weights or [1.0] * CLASSES, dtype=torch.float64)
    expected = -(factor * shares_of(targets, 0.1) * (1 - p) ** gamma * p.log()).sum(dim=1).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    if gamma == 0 and weights is None:
        torch.testing.assert_close(
            found.double(), F.cross_entropy(logits, targets, label_smoothing=0 if soft else 0.1)
        )


def test_a_sure_answer_has_a_finite_gradient_of_focal_loss() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        criterion("focal", focal_gamma=gamma)(logits, torch.tensor([0]), 0.0).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_binary_cross_entropy_is_that_of_timm(soft: bool, smoothing: float, threshold: float | None) -> None:
    logits, classes, mixed = drawn()
    targets = mixed.float() if soft else classes
    loss = criterion("bce", target_threshold=threshold)
    oracle = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    torch.testing.assert_close(loss(logits.float(), targets, smoothing), oracle(logits.float(), targets))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "focal"])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_do_not_depend_on_micro_batches(loss: str, soft: bool) -> None:
    logits, classes, mixed = drawn()
    targets, found = mixed.float() if soft else classes, criterion(loss, WEIGHTS)
    whole = found(logits.float(), targets, 0.1)
    parts = [
        found(logits[part].float(), targets[part], 0.1) for part in (slice(4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(sum(parts) / 3, whole)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "focal"])
def test_an_image_counts_by_the_weight_of_its_class(loss: str) -> None:
    logits, classes, _ = drawn()
    weighted, plain = criterion(loss, WEIGHTS), criterion(loss, [1.0] * 5)
    for row, target in zip(logits.float(), classes, strict=True):
        one, same = row[None], target[None]
        torch.testing.assert_close(weighted(one, same, 0.0), WEIGHTS[int(target)] * plain(one, same, 0.0))


def test_plain_cross_entropy_is_left_to_torch() -> None:
    assert build_criterion(usual(), None, CPU) is None


COUNTS = [400, 4, 0, 36]
NAMES = ["ant", "bee", "cat", "dog"]


def index() -> ImageIndex:
    targets = np.repeat(np.arange(4, dtype=np.int32), COUNTS)
    return ImageIndex(Path(), NAMES, paths=np.zeros(0, np.uint8), ends=np.zeros(0, int), targets=targets)


def weights_of(how: str, beta: float = 0.9) -> list[float] | None:
    return class_weights(replace(usual(), class_weight=how, effective_beta=beta), index())


def test_balanced_weights_give_each_class_the_same_sum() -> None:
    weights = weights_of("balanced")
    assert weights is not None
    sums = [weight * count for weight, count in zip(weights, COUNTS, strict=True) if count]
    assert sums == pytest.approx([440 / 3] * 3)
    assert weights[2] == 1.0  # no image has it
    assert weights_of("none") is None
    told = describe_weights(weights, NAMES, "balanced")
    assert told == "class weights (balanced): 0.367 (ant) to 36.7 (bee)"


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_effective_weights_are_those_of_the_paper(beta: float) -> None:
    weights = weights_of("effective", beta)
    assert weights is not None
    raw = [(1 - beta) / (1 - beta**count) if count else 0 for count in COUNTS]
    scale = sum(COUNTS) / sum(one * count for one, count in zip(raw, COUNTS, strict=True))
    assert weights == pytest.approx([one * scale if one else 1.0 for one in raw])


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.txt"
    file.write_text("bee: 10\nant: 0.5\n\ncat:1\ndog: 2.5\n")
    assert weights_of(str(file)) == [0.5, 10, 1, 2.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant: 1\nbee: 1\ncat: 1\n", "missing: dog"),
        ("ant: 1\nbee: 1\ncat: 1\ndog: 1\nDogs: 2\n", "unknown to the model: Dogs"),
        ("ant: 1\nbee: 0\ncat: 1\ndog: 1\n", "bee: 0: must be greater than 0"),
        ("ant: 1\nbee: many\ncat: 1\ndog: 1\n", "'bee: many' is not of the form 'class: number'"),
        ("ant: 1\nant: 2\n", "names the class 'ant' twice"),
    ],
)
def test_a_wrong_file_is_told(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=message):
        weights_of(str(file))


def test_a_word_that_is_no_choice_is_told() -> None:
    with pytest.raises(ConfigError, match="nor a file; did you mean 'balanced'"):
        weights_of("balnced")
