"""What all stages of a run share, from its first step to its last line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deepvit_train.config.train import TrainConfig
from deepvit_train.distributed.world import World
from deepvit_train.training.interruption import StopSignals
from deepvit_train.training.plan import Plan
from deepvit_train.training.state import TrainState


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all stages of a run share."""

    config: TrainConfig
    world: World
    plan: Plan
    state: TrainState
    signals: StopSignals
    say: Callable[[str], None]  # does nothing on ranks other than the first
    images: dict[str, Any] = field(default_factory=dict)  # what a checkpoint says of them (images.py)
    since: float = field(default_factory=time.monotonic)  # seconds; when this start began

    @property
    def out_of_patience(self) -> bool:
        """Whether the last of trainer.patience evaluations without a better one was of this state."""
        patience, state = self.config.trainer.patience, self.state
        return patience is not None and state.worse >= patience and state.evaluated_step == state.step

    @property
    def finished(self) -> bool:
        """Whether the state was evaluated, and is the plan's last one or ended its patience."""
        at_end = self.state.step >= self.plan.total_steps and self.state.evaluated_step == self.state.step
        return at_end or self.out_of_patience

    @property
    def hours(self) -> float:
        """Hours since this start began."""
        return (time.monotonic() - self.since) / 3600
