"""Builds the schedule of the learning rate, by optimizer step.

Symbols: t step, W steps of warm-up, T steps of trainer.epochs, D step at which wsd begins to decay.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler

from deepvit_train.config.schedule import ScheduleConfig, ScheduleName

RISE_SHARE = 0.1  # of the steps that are left: a rise after an extension, where there is no warm-up to repeat


class ClosedForm(Scheduler):
    """A rate that is a function of the step. timm's base gives each group its share of it.

    Args:
        steps: T.
        warmup: W.
        epoch: steps of an epoch.

    Attributes:
        rise: the step at which a run was extended, and the rate it had there; None if it never was.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, steps: int, warmup: int, epoch: int
    ) -> None:
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.schedule = schedule
        self.steps = steps
        self.warmup = warmup
        self.fall_every = max(1, round(schedule.decay_epochs * epoch))
        self.decay_from = steps - round(schedule.decay_share * steps)
        self.rise: tuple[int, float] | None = None

    def _get_lr(self, t: int) -> list[float]:
        return [self.rate(t, peak) for peak in self.base_values]

    def rate(self, t: int, peak: float) -> float:
        """Return the learning rate of step t.

        After an extension it climbs from where it was, as long as a warm-up takes, until it meets the
        schedule.
        """
        planned = self._planned(t, peak)
        if self.rise is None or t < self.rise[0]:
            return planned
        since, rate = self.rise
        length = self.warmup or max(1, round(RISE_SHARE * (self.steps - since)))
        return min(planned, rate + (peak - rate) * (t - since) / length)

    def _planned(self, t: int, peak: float) -> float:
        name, start, least = self.schedule.name, self.schedule.warmup_lr, self.schedule.min_lr
        if t < self.warmup:
            part = t / self.warmup
            return start + (peak - start) * (_half_cosine(part) if name == ScheduleName.onecycle else part)
        if name == ScheduleName.constant:
            return peak
        if name == ScheduleName.step:
            return max(least, peak * self.schedule.decay_rate ** (t // self.fall_every))
        return least if t >= self.steps else least + (peak - least) * self._left(t)

    def _left(self, t: int) -> float:
        """Return the share of the way from min_lr to the peak at which the rate is, for W <= t < T."""
        if self.schedule.name == ScheduleName.wsd:
            since = max(0, t - self.decay_from)
            return 1 - math.sqrt(since / (self.steps - self.decay_from)) if since else 1.0
        part = (t - self.warmup) / (self.steps - self.warmup)
        return 1 - (_half_cosine(part) if self.schedule.name == ScheduleName.onecycle else part)


def _half_cosine(part: float) -> float:
    return (1 - math.cos(math.pi * part)) / 2


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, epochs: int, steps_per_epoch: int
) -> Scheduler:
    """Build the schedule by optimizer step: a warm-up, then what its name says over `epochs`, then min_lr."""
    steps = epochs * steps_per_epoch
    warmup = round(schedule.warmup_within(epochs) * steps_per_epoch)
    if schedule.name != ScheduleName.cosine:
        return ClosedForm(optimizer, schedule, steps, warmup, steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=schedule.min_lr,
        warmup_t=warmup,
        warmup_lr_init=schedule.warmup_lr,
        t_in_epochs=False,
    )


def learning_rate_after(schedule: Scheduler, steps: int) -> float:
    """Return the highest learning rate of all groups in the step that follows so many steps."""
    return max(schedule._get_lr(steps))


def plain_schedule(schedule: Scheduler) -> dict[str, Any] | None:
    """Return what a checkpoint keeps of a schedule: its length and its extension. Most need nothing."""
    if not isinstance(schedule, ClosedForm) or schedule.schedule.name != ScheduleName.wsd:
        return None
    return {"steps": schedule.steps, "rise": schedule.rise and list(schedule.rise)}


def go_on_with(schedule: Scheduler, said: dict[str, Any] | None, step: int, rate: float | None) -> None:
    """Let wsd go on from a checkpoint of this step without a jump of the rate.

    Where the run had another length, the decay has begun already, and the new plan has a higher rate there:
    then the rate rises from what it was (Wen et al., arXiv 2410.05192, go on from decayed weights too).

    Args:
        said: what the checkpoint keeps of its schedule.
        rate: the rate that was to come when it was written.
    """
    if not isinstance(schedule, ClosedForm) or schedule.schedule.name != ScheduleName.wsd:
        return
    if said is not None and said["rise"] is not None:
        schedule.rise = (said["rise"][0], said["rise"][1])
    other_length = said is None or said["steps"] != schedule.steps
    if other_length and rate is not None and rate < learning_rate_after(schedule, step):
        schedule.rise = (step, rate)
