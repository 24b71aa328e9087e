"""How long a run will take, told once its speed is known."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.console import amount
from deepvit_train.training.plan import Plan


@dataclass
class Forecast:
    """Tells once how long a run still takes, at its second log line.

    The steps before the first line are left out: they load libraries, start loader processes and compile.
    """

    plan: Plan
    batch_size: int  # images an optimizer step, over all ranks
    lines: int = 0

    def line(self, step: int, images_per_s: float) -> str | None:
        """Return the line that is due with a log line after this step, or None.

        Args:
            images_per_s: the speed since the log line before.
        """
        self.lines += 1
        left = self.plan.total_steps - step
        if self.lines != 2 or not left:
            return None
        to_go = phrase(left * self.batch_size / images_per_s)
        whole = phrase(self.plan.total_steps * self.batch_size / images_per_s)
        return (
            f"to expect: {whole} for all {amount(self.plan.total_steps, 'step')}, {to_go} to go, "
            "without evaluations"
        )


def phrase(seconds: float) -> str:
    """Return a duration in the unit that fits it: '40 s', '12 min', '3.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:,.1f} h"
