"""Compare every schedule with its closed form, and with those of timm and torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.scheduler import StepLRScheduler

from deepvit_train.config.compose import compose_command
from deepvit_train.config.schedule import ScheduleConfig
from deepvit_train.config.shipped import choices
from deepvit_train.training.schedule import build_schedule, go_on_with, learning_rate_after, plain_schedule

EPOCHS, EPOCH = 20, 10
STEPS, PEAK = EPOCHS * EPOCH, 0.5


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)


@cache
def composed(*overrides: str) -> ScheduleConfig:
    return compose_command("train", ["trainer.epochs=20", "schedule.warmup_lr=0.1", *overrides]).schedule


def schedule_of(*overrides: str, epochs: int = EPOCHS) -> Any:
    return build_schedule(optimizer(), composed(*overrides), epochs, EPOCH)


def warmed(after: Callable[[int], float]) -> Callable[[int], float]:
    """The formula with a linear warm-up of 50 steps before it."""
    return lambda step: 0.1 + (PEAK - 0.1) * step / 50 if step < 50 else after(step)


FORMULAS = {
    "cosine": lambda t: 0.01 + (PEAK - 0.01) * (1 + math.cos(math.pi * t / STEPS)) / 2,
    "linear": lambda t: 0.01 + (PEAK - 0.01) * (STEPS - t) / (STEPS - 50),
    "constant": lambda t: PEAK,
    "wsd": lambda t: PEAK if t < 160 else 0.01 + (PEAK - 0.01) * (1 - ((t - 160) / 40) ** 0.5),
    "step": lambda t: max(0.01, PEAK * 0.1 ** (t // 70)),
}


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_schedule_has_its_closed_form(name: str) -> None:
    keys = ["schedule.warmup_epochs=5"]
    keys += [] if name == "constant" else ["schedule.min_lr=0.01", "schedule.cooldown_epochs=2"]
    keys += ["schedule.decay_epochs=7"] if name == "step" else []
    schedule = schedule_of(f"schedule={name}", *keys)
    expected = warmed(FORMULAS[name])
    for step in range(STEPS):
        schedule.step_update(step)
        assert schedule.optimizer.param_groups[0]["lr"] == pytest.approx(expected(step), rel=1e-12), step
    for step in range(STEPS, STEPS + 20):
        assert learning_rate_after(schedule, step) == pytest.approx(PEAK if name == "constant" else 0.01)


def test_one_cycle_is_that_of_torch() -> None:
    schedule = schedule_of("schedule=onecycle", "schedule.min_lr=0.001")
    warmup = round(0.3 * STEPS)
    other = optimizer()
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        other,
        PEAK,
        total_steps=STEPS + 1,
        pct_start=(warmup + 1) / (STEPS + 1),
        div_factor=PEAK / 0.1,
        final_div_factor=0.1 / 0.001,
        cycle_momentum=False,
    )
    for step in range(STEPS + 1):
        assert learning_rate_after(schedule, step) == pytest.approx(other.param_groups[0]["lr"], rel=1e-9), (
            step
        )
        other.step()
        if step < STEPS:
            oracle.step()


def test_steps_are_those_of_timm() -> None:
    schedule = schedule_of("schedule=step", "schedule.decay_epochs=3", "schedule.decay_rate=0.5")
    oracle = StepLRScheduler(
        optimizer(),
        decay_t=30,
        decay_rate=0.5,
        warmup_t=50,
        warmup_lr_init=0.1,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    for step in range(STEPS):
        assert learning_rate_after(schedule, step) == pytest.approx(oracle._get_lr(step)[0], rel=1e-12), step


@pytest.mark.parametrize("name", choices("schedule"))
def test_the_warm_up_can_be_a_share_of_the_run(name: str) -> None:
    share, epochs = (
        schedule_of(f"schedule={name}", f"schedule.{key}")
        for key in ("warmup_share=0.25", "warmup_share=null")
    )
    assert learning_rate_after(share, 0) == 0.1
    assert learning_rate_after(share, 25) < learning_rate_after(share, 49)
    if name != "onecycle":  # its own share is 0.3
        assert [share._get_lr(step) for step in range(STEPS)] == [
            epochs._get_lr(step) for step in range(STEPS)
        ]


def extended(step: int, epochs: int = 40, warmup: int = 5) -> tuple[Any, list[float]]:
    """A run of 20 epochs with wsd that goes on to more epochs at a step; its rates from then on."""
    keys = ["schedule=wsd", f"schedule.warmup_epochs={warmup}"]
    first, longer = schedule_of(*keys), schedule_of(*keys, epochs=epochs)
    go_on_with(longer, plain_schedule(first), step, learning_rate_after(first, step))
    return longer, [learning_rate_after(longer, each) for each in range(step, epochs * EPOCH + 1)]


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("step", [160, 180, 200])
def test_an_extended_run_goes_on_without_a_jump(step: int, warmup: int) -> None:
    first = schedule_of("schedule=wsd", f"schedule.warmup_epochs={warmup}")
    schedule, rates = extended(step, warmup=warmup)
    assert rates[0] == pytest.approx(learning_rate_after(first, step))
    assert max(rates) == PEAK
    assert rates[-1] == 0
    climb = 50 if warmup else round(0.1 * (400 - step))
    rises = [after - before for before, after in pairwise(rates)]
    assert max(rises) <= PEAK / climb + 1e-12
    # What the run itself saves from now on says the same.
    again = schedule_of("schedule=wsd", f"schedule.warmup_epochs={warmup}", epochs=40)
    go_on_with(again, plain_schedule(schedule), step + 9, learning_rate_after(schedule, step + 9))
    assert again._get_lr(step + 9) == schedule._get_lr(step + 9)
    assert again.rise == schedule.rise


def test_a_run_that_is_extended_before_its_decay_is_the_longer_run() -> None:
    schedule, rates = extended(100)
    longer = schedule_of("schedule=wsd", "schedule.warmup_epochs=5", epochs=40)
    assert schedule.rise is None
    assert rates == [learning_rate_after(longer, step) for step in range(100, 401)]
