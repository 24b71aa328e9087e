"""How long a run will take: when it is told, and whether it is right."""

from __future__ import annotations

import pytest
import torch

from deepvit_train.distributed.world import World
from deepvit_train.training import meter as meters
from deepvit_train.training.forecast import Forecast, phrase
from deepvit_train.training.meter import Meter
from deepvit_train.training.plan import Plan


class Clock:
    """The time in seconds, which passes as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(meters.time, "perf_counter", lambda: self.now)


def told(
    clock: Clock, seconds: list[float], total: int, first: int = 1, pause_s: float = 0.0
) -> dict[int, str]:
    """Return the lines by step, of a start whose steps take so many seconds, each followed by a pause."""
    meter = Meter(World(rank=0, size=1, device=torch.device("cpu")))
    forecast, lines = Forecast(Plan(10, total, 8, 10, None, 10, None), meter), {}
    for step, taken in enumerate(seconds, first):
        clock.now += taken
        if (line := forecast.line(step)) is not None:
            lines[step] = line
        with meter.paused():
            clock.now += pause_s
    return lines


@pytest.mark.parametrize(
    ("seconds", "total", "expected"),
    [
        # A minute a step: nobody waits for longer than two of 120 minutes.
        (
            [64.0, 60.0, 60.0],
            120,
            {
                1: "first step: 64 s, loading included; 2.1 h to go if each is as slow",
                2: "to expect: 2.0 h for all 120 steps, 2.0 h to go, without evaluations",
            },
        ),
        # The first step compiles and does not count.
        ([4.0] + [0.5] * 9, 330, {8: "to expect: 3 min for all 330 steps, 3 min to go, without evaluations"}),
        # Five seconds are enough in a long run.
        (
            [1.0] + [0.1] * 60,
            72000,
            {51: "to expect: 2.0 h for all 72,000 steps, 2.0 h to go, without evaluations"},
        ),
        ([1.0] * 4, 4, {3: "to expect: 4 s for all 4 steps, 1 s to go, without evaluations"}),
        ([1.0], 1, {}),
    ],
)
@pytest.mark.parametrize("pause_s", [0.0, 1000.0])
def test_the_time_to_expect_is_told_once_after_a_few_steps(
    seconds: list[float],
    total: int,
    expected: dict[int, str],
    pause_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = told(Clock(monkeypatch), seconds, total, pause_s=pause_s)
    # 5.0 seconds are a sum of tenths, which may lie on either side of 5.
    assert list(found.values()) == list(expected.values())
    assert all(abs(step - other) <= 1 for step, other in zip(found, expected, strict=True))


def test_a_run_that_goes_on_tells_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(Clock(monkeypatch), [1.0, 10.0], total=100, first=51)
    assert found == {52: "to expect: 17 min for all 100 steps, 8 min to go, without evaluations"}


@pytest.mark.parametrize(
    ("seconds", "said"), [(40, "40 s"), (99, "99 s"), (720, "12 min"), (6000, "1.7 h"), (3.6e6, "1,000.0 h")]
)
def test_a_duration_has_the_unit_that_fits_it(seconds: float, said: str) -> None:
    assert phrase(seconds) == said
