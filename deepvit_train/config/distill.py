"""Declare the keys of `distill`: the teacher, a trained model whose answers are learned beside the labels."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.foreign import CLASSES, Weights
from deepvit_train.config.option import Choice, Section, option
from deepvit_train.config.recipe import Precision
from deepvit_train.error import CheckpointError, ConfigError, DataError

TIMM = "timm:"


class DistillKind(Choice):
    soft = "soft"  # the teacher's probabilities (Hinton et al., arXiv 1503.02531)
    hard = "hard"  # the class that the teacher answers (Touvron et al., arXiv 2012.12877)


@dataclass(kw_only=True, slots=True)
class DistillConfig(Section):
    teacher: str | None = option(
        "model to learn from: a run, a checkpoint, a weights file, hf:ORG/NAME[@REVISION], or timm:NAME for "
        "any model of timm; null: none",
        path=CheckpointError,
    )
    file: str | None = option(
        "weights file of a teacher timm:NAME; null: the one in timm's cache", path=CheckpointError
    )
    weights: Weights = option("which weights of the teacher; auto: the averaged ones where there are any")
    classes: str | None = option(f"of the teacher: {CLASSES}", path=DataError)
    kind: DistillKind = option("what is learned: the teacher's probabilities, or the class that it answers")
    share: float = option(
        "part of the loss that is the teacher's; the rest is that of the labels", above=0, high=1
    )
    temperature: float = option(
        "of distill.kind=soft: what both models' logits are divided by", above=0, high=1000
    )
    precision: Precision | None = option("number format of the teacher's products; null: trainer.precision")

    @classmethod
    def prefix(cls) -> str:
        return "distill."

    def check(self) -> None:
        if self.file is not None and not (self.teacher or "").startswith(TIMM):
            raise ConfigError(
                f"distill.file={self.file}: is the weights file of a model of timm; nearest: "
                f"distill.teacher={self.file}, or distill.teacher=timm:NAME beside it"
            )

    def check_typed(self, typed: set[str]) -> None:
        others = sorted(key for key in typed if key.startswith("distill.") and key != "distill.teacher")
        if self.teacher is None and others:
            raise ConfigError(f"{others[0]}: there is no teacher; nearest: distill.teacher=FILE")
        if "distill.temperature" in typed and self.kind != DistillKind.soft:
            raise ConfigError(
                f"distill.temperature: distill.kind={self.kind} does not read it; nearest: distill.kind=soft"
            )
