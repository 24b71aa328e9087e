"""Watches the attention maps of a model in training, and raises the alarm when they do not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepvit_train.collapse.probe import Probe
from deepvit_train.config.collapse import WatchConfig
from deepvit_train.distributed.parallel import gathered
from deepvit_train.error import MEMORY_KEYS, Collapsed, is_out_of_memory
from deepvit_train.models import Attention
from deepvit_train.run.tracking import Tracker
from deepvit_train.training.state import TrainState


@torch.no_grad()
def mixing_scalars(model: nn.Module) -> dict[str, float]:
    """Return the mean and the standard deviation of each parameter that mixes heads, over all blocks.

    They are called 'mixing/theta_mean', 'mixing/theta_std', 'mixing/norm.weight_mean', and so on. One
    that never moves shows as a level line.
    """
    values: dict[str, list[Tensor]] = {}
    for attention in model.modules():
        if isinstance(attention, Attention):
            mixing = {id(parameter) for parameter in attention.mixing_parameters()}
            for name, parameter in attention.named_parameters():
                if id(parameter) in mixing:
                    values.setdefault(name, []).append(parameter.flatten().double())
    found = {}
    for name, parts in values.items():
        every = torch.cat(parts)
        found[f"mixing/{name}_mean"] = float(every.mean())
        found[f"mixing/{name}_std"] = float(every.std(correction=0))
    return found


@dataclass(frozen=True)
class CollapseWatch:
    """Logs what a probe sees, and compares it with the bounds that the configuration sets."""

    probe: Probe | None  # only the first rank has one
    bounds: WatchConfig
    tracker: Tracker
    say: Callable[[str], None]
    steps: int  # of the whole run

    def look(self, state: TrainState) -> bool:
        """Log what the blocks contribute and how similar their maps are, and warn. All ranks must call this.

        Returns whether more blocks are replaceable than collapse.stop_above allows.
        """
        with gathered(state.model) as model:
            if self.probe is None:
                return False
            try:
                look = self.probe.look(model)
                scalars = look.scalars | mixing_scalars(model)
            except Exception as error:  # for want of memory: no reason to lose the training
                if not is_out_of_memory(error):
                    raise
                self.say(
                    f"step {state.step}: warning: out of memory, so attention maps were not looked at; try "
                    f"{MEMORY_KEYS['probe']}"
                )
                return False
        bounds, ratio = self.bounds, look.replaceable
        self.tracker.scalars(state.step, scalars)
        self.tracker.images("collapse/similarity", look.picture, state.step)
        if state.step < bounds.alarm_from * self.steps or state.step == 0:
            return False  # nothing has been learned yet, so no maps matter
        if bounds.warn_above is not None and ratio > bounds.warn_above:
            self.say(
                f"step {state.step}: warning: {ratio:.2f} of the blocks are replaceable, more than "
                f"collapse.warn_above={bounds.warn_above:g} ({bounds.swap_legend})"
            )
        return bounds.stop_above is not None and ratio > bounds.stop_above

    def error(self, step: int, saved: object) -> Collapsed:
        """Return the error that ends a run after the alarm. `saved` names its last checkpoint."""
        bounds = self.bounds
        return Collapsed(
            f"step {step}: the share of replaceable blocks is above collapse.stop_above="
            f"{bounds.stop_above:g} ({bounds.swap_legend}); saved {saved}; "
            "a higher collapse.stop_above goes on"
        )
