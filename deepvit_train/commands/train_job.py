"""A run of deepvit-train that was built: what it begins with, and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepvit_train.data.index import ImageIndex
from deepvit_train.data.label import Labels
from deepvit_train.evaluation.calibration import reattention_norms
from deepvit_train.models import DeepViT
from deepvit_train.run.folder import RunFolder
from deepvit_train.training.distillation import Teacher
from deepvit_train.training.origin import Origin
from deepvit_train.training.plan import Plan
from deepvit_train.training.run import Run


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a run begins with: its data, its plan, its model, and where its weights come from."""

    splits: dict[str, ImageIndex]  # by their names
    train: ImageIndex
    val: ImageIndex
    labels: Labels  # of val
    origin: Origin
    plan: Plan
    model: DeepViT
    initial: str | None  # a line on the initial weights that were loaded
    class_weights: list[float] | None  # of the loss; None: equal ones
    teacher: Teacher | None

    @property
    def teacher_digest(self) -> str | None:
        """The SHA-256 of the teacher, if there is one."""
        return None if self.teacher is None else self.teacher.digest


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that was built, with its folder and what it was built from."""

    run: Run
    folder: RunFolder
    opened: Opened

    @property
    def train(self) -> ImageIndex:
        """The training images."""
        return self.opened.train

    @property
    def val(self) -> ImageIndex:
        """The images that are evaluated."""
        return self.opened.val

    @property
    def labels(self) -> Labels:
        """How the images that are evaluated were labelled."""
        return self.opened.labels

    @property
    def calibrate_images(self) -> int:
        """How many training images to calibrate on; 0 if the model has nothing to calibrate."""
        needed = bool(reattention_norms(self.run.state.model))
        return self.run.config.trainer.calibrate_images if needed else 0

    def is_here(self, checkpoint: Path | None) -> bool:
        """Return whether a checkpoint lies in the run's own folder, and not where `resume=` led."""
        return checkpoint is not None and checkpoint.parent == self.folder.checkpoints
