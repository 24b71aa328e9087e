"""Declare the keys of `schedule`: the learning rate over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.error import ConfigError


class ScheduleName(Choice):
    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay
    constant = "constant"
    linear = "linear"
    onecycle = "onecycle"
    step = "step"


# The schedules that read a key. Those that are not here are read by all.
READ_BY = {
    "min_lr": set(ScheduleName) - {ScheduleName.constant},
    "cooldown_epochs": set(ScheduleName) - {ScheduleName.constant},
    "decay_share": {ScheduleName.wsd},
    "decay_epochs": {ScheduleName.step},
    "decay_rate": {ScheduleName.step},
}


@dataclass(kw_only=True, slots=True)
class ScheduleConfig(Section):
    name: ScheduleName = option("how the learning rate falls after the warm-up")
    warmup_epochs: float = option(
        "epochs of linear warm-up, a part of trainer.epochs; a default that leaves nothing of a short run "
        "becomes half of it",
        low=0,
    )
    warmup_share: float | None = option(
        "warm-up as a share of trainer.epochs, in place of warmup_epochs; null: warmup_epochs", low=0, below=1
    )
    warmup_lr: float = option("learning rate at the first step of the warm-up", low=0, high=1000)
    min_lr: float = option("learning rate at the end of the decay and during the cooldown", low=0, high=1000)
    cooldown_epochs: int = option("epochs at min_lr, on top of trainer.epochs", low=0)
    decay_share: float = option(
        "of schedule=wsd: the last share of trainer.epochs, which decays", above=0, high=1
    )
    decay_epochs: float = option("of schedule=step: epochs from one fall of the rate to the next", above=0)
    decay_rate: float = option("of schedule=step: what the rate is multiplied by", above=0, below=1)

    @classmethod
    def prefix(cls) -> str:
        return "schedule."

    def check(self) -> None:
        decays, rises = self.decay_share, self.warmup_share
        if self.name == ScheduleName.wsd and rises is not None and rises + decays > 1:
            raise ConfigError(
                f"schedule.warmup_share={rises:g}: the decay begins before the warm-up ends; nearest: "
                f"schedule.warmup_share={1 - decays:g}"
            )

    def check_typed(self, typed: set[str]) -> None:
        for key, readers in READ_BY.items():
            if f"schedule.{key}" in typed and self.name not in readers:
                raise ConfigError(
                    f"schedule.{key}: schedule={self.name} does not read it; nearest: "
                    f"schedule={min(readers, key=list(ScheduleName).index)}"
                )
        if "schedule.warmup_epochs" in typed and self.warmup_share is not None:
            raise ConfigError(
                f"schedule.warmup_epochs: schedule.warmup_share={self.warmup_share:g} is in its place; "
                "nearest: schedule.warmup_share=null beside it"
            )

    def warmup_within(self, epochs: int) -> float:
        """Return the epochs of warm-up: a share of the run, or warmup_epochs, or half if that is too long."""
        if self.warmup_share is not None:
            return self.warmup_share * epochs
        return self.warmup_epochs if self.warmup_epochs < epochs else epochs / 2
