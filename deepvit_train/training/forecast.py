"""How long a run will take, told after its first few steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepvit_train.console import amount
from deepvit_train.training.meter import Meter
from deepvit_train.training.plan import Plan

ENOUGH_S = 5.0  # so many seconds of steps are enough to tell what the others take
ENOUGH_SHARE = 0.02  # and so is this share of all steps, where they are fast


@dataclass
class Forecast:
    """Tells once how long a run still takes, as soon as a few steps were timed.

    The first step of a start is left out of that, because it loads libraries, starts loader processes and
    compiles. If it was slow, it has a line of its own, so that nobody waits in silence. A GPU is waited for
    twice in a start: after the first step, and when the time is told.
    """

    plan: Plan
    meter: Meter
    first: tuple[int, float] | None = field(init=False, default=None)  # the first step, and when it ended
    told: bool = field(init=False, default=False)

    def line(self, step: int) -> str | None:
        """Return the line that is due after this step, or None. Must be called after every step."""
        total = self.plan.total_steps
        if self.told or step == total:
            return None
        if self.first is None:
            self.first = step, self.meter.seconds(wait=True)
            if (step_s := self.first[1]) < ENOUGH_S:
                return None
            to_go = phrase(step_s * (total - step))
            return f"first step: {phrase(step_s)}, loading included; {to_go} to go if each is as slow"
        first, ended = self.first
        steps = step - first
        if steps < max(2, ENOUGH_SHARE * total) and self.meter.seconds() - ended < ENOUGH_S:
            return None
        self.told = True
        step_s = (self.meter.seconds(wait=True) - ended) / steps
        return (
            f"to expect: {phrase(step_s * total)} for all {amount(total, 'step')}, "
            f"{phrase(step_s * (total - step))} to go, without evaluations"
        )


def phrase(seconds: float) -> str:
    """Return a duration in the unit that fits it: '40 s', '12 min', '3.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:,.1f} h"
