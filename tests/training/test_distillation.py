"""Learning from a teacher: the two losses by their formulas, and what the teacher sees and answers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from deepvit_train.config.distill import DistillKind
from deepvit_train.config.preprocessing import Interpolation, Preprocessing
from deepvit_train.config.recipe import Precision
from deepvit_train.training.distillation import Distillation, Teacher

OURS = Preprocessing(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.9, Interpolation.bicubic)
THEIRS = replace(OURS, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class Seen(nn.Module):
    """Answers with the mean of each channel, and keeps what it saw."""

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean(dim=(2, 3))


def distillation(
    teacher: nn.Module | None = None, theirs: Preprocessing = OURS, **changes: Any
) -> Distillation:
    made = Teacher(teacher or Seen(), theirs, changes.pop("columns", [0, 1, 2]), "0" * 64, "")
    options = {
        "kind": DistillKind.soft,
        "share": 0.5,
        "temperature": 1.0,
        "precision": Precision.fp32,
        "device": torch.device("cpu"),
    }
    return Distillation(made, OURS, **(options | changes))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_loss_is_the_divergence_from_the_teacher(temperature: float) -> None:
    logits, answer = drawn(2, 4, 5)
    expected = 0.0
    for row, column in product(range(4), range(5)):
        p = (answer[row].double() / temperature).softmax(0)[column]
        q = (logits[row].double() / temperature).softmax(0)[column]
        expected += float(p * (p.log() - q.log())) * temperature**2 / 4
    found = distillation(temperature=temperature).loss(logits, answer)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert distillation(temperature=temperature).loss(answer, answer).item() == pytest.approx(0, abs=1e-6)


def test_the_hard_loss_is_the_log_probability_of_the_teachers_class() -> None:
    logits, answer = drawn(2, 4, 5)
    expected = sum(-logits[row].double().log_softmax(0)[answer[row].argmax()] for row in range(4)) / 4
    found = distillation(kind=DistillKind.hard).loss(logits, answer)
    assert found.item() == pytest.approx(float(expected), rel=1e-5)


def test_the_teacher_sees_images_in_its_own_range_and_size() -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        (pixels - torch.tensor(each.mean)[:, None, None]) / torch.tensor(each.std)[:, None, None]
        for each in (OURS, THEIRS)
    )
    teacher = Seen()
    distillation(teacher, THEIRS).answer(ours)
    torch.testing.assert_close(teacher.images, theirs)
    distillation(teacher).answer(ours)
    assert teacher.images is ours
    distillation(teacher, replace(OURS, image_size=12)).answer(ours)
    assert teacher.images.shape == (2, 3, 12, 12)


def test_outputs_are_taken_in_the_order_of_the_students_classes() -> None:
    images = drawn(2, 3, 8, 8)
    found = distillation(columns=[2, 0]).answer(images)
    torch.testing.assert_close(found, images.mean(dim=(2, 3))[:, [2, 0]])


def test_the_answer_takes_no_gradient_and_draws_nothing() -> None:
    teacher = timm.create_model("test_vit", num_classes=3, img_size=32, drop_rate=0.5).eval()
    images = drawn(2, 3, 8, 8).requires_grad_()
    before = torch.random.get_rng_state()
    found = distillation(teacher, replace(OURS, image_size=32), precision=Precision.bf16)
    answer = found.answer(images)
    assert not answer.requires_grad
    assert answer.dtype == torch.float32
    assert torch.equal(answer, found.answer(images))
    assert torch.equal(torch.random.get_rng_state(), before)
