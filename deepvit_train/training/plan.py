"""The length of a run in optimizer steps, and what is due after each."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.recipe import TrainerConfig
from deepvit_train.config.schedule import ScheduleConfig
from deepvit_train.console import amount
from deepvit_train.error import ConfigError


@dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps. `evaluates(step)` speaks of the state after that step.

    Args:
        micro_batch: how many images one rank passes through the model at a time.
    """

    steps_per_epoch: int
    total_steps: int
    micro_batch: int
    eval_every_steps: int
    save_every_steps: int | None
    log_every_steps: int
    probe_every_steps: int | None

    def evaluates(self, step: int) -> bool:
        """Return whether the state after this step is evaluated."""
        return step == self.total_steps or step % self.eval_every_steps == 0

    def saves(self, step: int) -> bool:
        """Return whether the state after this step is saved. It always is if it was evaluated."""
        return self.evaluates(step) or (
            self.save_every_steps is not None and step % self.save_every_steps == 0
        )

    def logs(self, step: int) -> bool:
        """Return whether training scalars are logged after this step."""
        return step % self.log_every_steps == 0 or step == self.total_steps

    def probes(self, step: int) -> bool:
        """Return whether the attention maps are looked at after this step. Step 0 is the untrained model."""
        return self.probe_every_steps is not None and step % self.probe_every_steps == 0

    def epoch(self, step: int) -> float:
        """Return the number of epochs done after this step."""
        return step / self.steps_per_epoch


def build_plan(trainer: TrainerConfig, schedule: ScheduleConfig, images: int, world_size: int) -> Plan:
    """Plan a run over a number of training images. Raises ConfigError if batches can't be formed."""
    parts = world_size * trainer.parts
    if trainer.batch_size % parts:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} is not divisible by {amount(world_size, 'rank')} x "
            "trainer.accumulate="
            f"{trainer.parts}; nearest: "
            f"trainer.batch_size={max(1, round(trainer.batch_size / parts)) * parts}"
        )
    steps_per_epoch = images // trainer.batch_size
    if images < parts:
        fewer = amount(images, "rank") if images < world_size else f"trainer.batch_size={world_size}"
        raise ConfigError(
            f"{amount(images, 'training image')} are too few for {amount(world_size, 'rank')} x "
            f"trainer.accumulate={trainer.parts}; nearest: {fewer} trainer.accumulate=1"
        )
    if not steps_per_epoch:
        raise ConfigError(
            f"trainer.batch_size={trainer.batch_size} is more than the {amount(images, 'training image')}; "
            f"nearest: trainer.batch_size={images // parts * parts}"
        )
    steps_per_epoch = min(steps_per_epoch, trainer.limit_batches or steps_per_epoch)
    total = (trainer.epochs + schedule.cooldown_epochs) * steps_per_epoch
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=min(total, trainer.max_steps or total),
        micro_batch=trainer.batch_size // parts,
        eval_every_steps=trainer.eval_every_epochs * steps_per_epoch,
        save_every_steps=trainer.save_every_steps,
        log_every_steps=trainer.log_every_steps,
        probe_every_steps=trainer.probe_every_steps,
    )
