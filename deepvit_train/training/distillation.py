"""Learn from a teacher: a trained model answers the images of each step, and the loss compares the answers.

The teacher sees what the model sees: the same crop, augmented and mixed (Beyer et al., arXiv 2106.05237).
There is no distillation token: the same logits learn from labels and teacher.

Shapes: B images, C classes of the model, O outputs of the teacher, S image size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit_train.config.distill import DistillKind
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.config.recipe import Precision
from deepvit_train.evaluation.loaded import LoadedModel
from deepvit_train.precision import autocast


@dataclass(frozen=True)
class Teacher:
    """A trained model that is not changed any more.

    Args:
        model: in evaluation mode; images -> logits (B, O).
        preprocessing: what it expects of its images.
        columns: which of its outputs each class of the student is, C of them.
        digest: SHA-256 of its tensors.
        told: a line that says what it is.
        loaded: what else its checkpoint says; None for a model of timm.
    """

    model: nn.Module
    preprocessing: Preprocessing
    columns: list[int]
    digest: str
    told: str
    loaded: LoadedModel | None = None


@dataclass(frozen=True)
class Distillation:
    """The part of the loss that compares a model with its teacher.

    Args:
        teacher: its model is on the device.
        of_student: how the images were prepared that reach the student.
        share: part of the loss that is the teacher's.
        temperature: of the soft kind.
        device: where images and the teacher are.
    """

    teacher: Teacher
    of_student: Preprocessing
    kind: DistillKind
    share: float
    temperature: float
    precision: Precision
    device: torch.device

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor:
        """Return the teacher's logits (B, C), in single precision, for images as the student sees them."""
        with autocast(images.device, self.precision):
            logits: Tensor = self.teacher.model(self._prepared(images))
        return logits.float().index_select(1, self._columns)

    def loss(self, logits: Tensor, answer: Tensor) -> Tensor:
        """Return the mean over images of what the student's logits miss of the teacher's answer.

        soft: T^2 KL(softmax(answer / T) || softmax(logits / T)), whose gradient does not shrink as T grows.
        hard: the cross-entropy with the class that the teacher answers.

        Args:
            logits, answer: (B, C), in single precision.
        """
        if self.kind == DistillKind.hard:
            return F.cross_entropy(logits, answer.argmax(dim=1))
        ours, theirs = ((each / self.temperature).log_softmax(dim=1) for each in (logits, answer))
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)

    def _prepared(self, images: Tensor) -> Tensor:
        """Return images (B, 3, S, S) as the teacher expects them: its mean and deviation, and its size."""
        ours, theirs = self.of_student, self.teacher.preprocessing
        if (ours.mean, ours.std) != (theirs.mean, theirs.std):
            scale, shift = self._range
            images = images * scale + shift
        if ours.image_size != theirs.image_size:
            size = [theirs.image_size] * 2
            images = F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
        return images

    # Both are made once: a list that is copied to a GPU in each step would let the host wait for it.

    @cached_property
    def _columns(self) -> Tensor:
        """The teacher's outputs of the student's classes, (C,)."""
        return torch.tensor(self.teacher.columns, device=self.device)

    @cached_property
    def _range(self) -> tuple[Tensor, Tensor]:
        """What brings the student's pixels into the teacher's range: times the first, plus the second."""
        mean, std, their_mean, their_std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for each in (self.of_student, self.teacher.preprocessing)
            for values in (each.mean, each.std)
        )
        return std / their_std, (mean - their_mean) / their_std
