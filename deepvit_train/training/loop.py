"""The training loop: steps, and what is due between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepvit_train.collapse.probe import Probe
from deepvit_train.config.command import TrainConfig
from deepvit_train.console import progress_bar
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.dataset import Batch
from deepvit_train.data.transform import denormalise
from deepvit_train.distributed.parallel import gathered, is_sharded, replicate, whole
from deepvit_train.distributed.world import World
from deepvit_train.error import Collapsed, Interrupted, NotFiniteError
from deepvit_train.models import DeepViT
from deepvit_train.run.saving import CheckpointWriter
from deepvit_train.run.tracking import Tracker
from deepvit_train.training.finite import FiniteGuard, first_non_finite
from deepvit_train.training.interruption import EvaluationStopped, StopSignals, interrupted, requeue
from deepvit_train.training.meter import Meter
from deepvit_train.training.plan import Plan
from deepvit_train.training.recipe import build_mixup, learning_rate
from deepvit_train.training.regulariser import build_regulariser
from deepvit_train.training.state import TrainState
from deepvit_train.training.step import StepOptions, train_step
from deepvit_train.training.validation import Validation

GRID_IMAGES = 36  # augmented training images shown in TensorBoard


@dataclass(frozen=True)
class _Due:
    """What follows a step."""

    logs: bool
    evaluates: bool
    saves: bool
    stops: bool
    alarms: bool


@dataclass(kw_only=True)
class Trainer:
    """The loop over steps and what is due between them."""

    config: TrainConfig
    world: World
    plan: Plan
    writer: CheckpointWriter | None  # the first rank's alone
    state: TrainState
    validation: Validation
    bad: BadFiles
    probe: Probe | None  # the first rank's alone
    tracker: Tracker
    signals: StopSignals
    description: dict[str, Any]
    say: Callable[[str], None]
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self.meter = Meter(self.world, self.state.losses, self.state.loss_steps)

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train from the state's step to the plan's end."""
        config, plan, state = self.config, self.plan, self.state
        options = self._step_options()
        guard = FiniteGuard(self.world, scaled=state.scaler.is_enabled())
        with self.meter.paused():
            forward = _wrapped(state.model, config, self.world)
            if 0 < state.step != state.evaluated_step and plan.evaluates(state.step):
                self._evaluate_and_save()  # the run was stopped between the step and its evaluation
            if state.step == 0 and plan.probes(0):
                self._look_at_maps()
        with progress_bar() as progress:
            bar = progress.add_task("training", total=plan.total_steps, completed=state.step)
            while state.step < plan.total_steps:
                asked = time.perf_counter()
                micro_batches = [next(batches) for _ in range(config.trainer.accumulate)]
                waited_s = time.perf_counter() - asked
                self._look_at(micro_batches)
                try:
                    result = train_step(state, forward, micro_batches, self.world, options, guard)
                    with self.meter.paused():
                        alarm = self._look_at_maps() if plan.probes(state.step) else False
                    due = self._agree(alarm)
                    if due.logs or due.saves:
                        guard.check()
                    if due.logs or due.saves or self.world.size == 1:
                        self._settle_bad_files()
                except NotFiniteError as error:
                    with gathered(state.model) as model:
                        found = first_non_finite(model, micro_batches, self.world, options.precision)
                    where = ", ".join(sorted(self.world.union(found))) or "the backward pass"
                    raise NotFiniteError(
                        f"{error}; first in {where}; last good checkpoint: {self._saved()}"
                    ) from None
                self.meter.add(result.loss, config.trainer.batch_size, waited_s)
                progress.update(bar, completed=state.step)
                if due.logs:
                    scalars = self.meter.take(learning_rate(state.optimizer), result.grad_norm)
                    # The last step's, of this rank.
                    penalty = {"train/cosine_penalty": result.penalty.item()} if options.regulariser else {}
                    self._log(scalars | penalty)
                if due.evaluates:
                    with self.meter.paused():
                        self._evaluate_and_save()
                elif due.saves:
                    self._save(best=False)
                if due.stops:
                    raise self._interrupted()
                if due.alarms:
                    raise self._collapsed()

    def _step_options(self) -> StepOptions:
        config = self.config
        return StepOptions(
            seed=config.seed,
            precision=config.trainer.precision,
            label_smoothing=config.loss.label_smoothing,
            mixup=build_mixup(
                config.augment, config.loss.label_smoothing, self.validation.classes, self.plan.micro_batch
            ),
            clip_grad=config.trainer.clip_grad,
            max_scaler_skips=config.trainer.max_scaler_skips,
            regulariser=build_regulariser(config.loss, config.model.depth),
        )

    def _agree(self, alarm: bool) -> _Due:
        """What is due after this step; ranks agree on what signals and the alarm ask for."""
        plan, step = self.plan, self.state.step
        stops, asked, alarms = map(
            bool, self.world.largest(self.signals.stop, self.signals.take_save(), alarm)
        )
        return _Due(
            logs=plan.logs(step),
            evaluates=plan.evaluates(step) and not stops,
            saves=stops or asked or alarms or plan.saves(step),
            stops=stops,
            alarms=alarms,
        )

    def _look_at(self, batches: list[Batch]) -> None:
        """Show the first images, and note the bad files of every batch."""
        if self.state.step == 0:
            shown = denormalise(batches[0].images[:GRID_IMAGES], self.config.model.preprocessing)
            self.tracker.images("train/images", shown, step=0)
        for batch in batches:
            self.bad.note(batch.bad)

    def _look_at_maps(self) -> bool:
        """Log what the probe sees. Returns whether so many blocks are similar that the run is to end."""
        with gathered(self.state.model) as model:
            if self.probe is None:
                return False
            look = self.probe.look(model)
        bounds = self.config.collapse
        self.tracker.scalars(self.state.step, look.scalars)
        self.tracker.images("collapse/similarity", look.picture, self.state.step)
        ratio = look.similar_ratio
        if bounds.warn_above is not None and ratio > bounds.warn_above:
            self.say(
                f"step {self.state.step}: warning: {ratio:.2f} of the blocks are similar, more than "
                f"collapse.warn_above={bounds.warn_above:g} ({bounds.legend})"
            )
        # The untrained model's maps may all be alike; that is no collapse.
        return bounds.stop_above is not None and ratio > bounds.stop_above and self.state.step > 0

    def _settle_bad_files(self) -> None:
        if self.bad.settle():
            self.tracker.scalars(self.state.step, {"train/bad_files": len(self.state.bad_files)})

    def _log(self, scalars: dict[str, float]) -> None:
        step, plan = self.state.step, self.plan
        self.tracker.scalars(step, scalars)
        self.say(
            f"step {step}/{plan.total_steps}  epoch {plan.epoch(step):.2f}  loss "
            f"{scalars['train/loss']:.4f}  "
            f"lr {scalars['train/lr']:.2e}  {scalars['train/images_per_s']:.0f} images/s"
        )

    def _evaluate_and_save(self) -> None:
        try:
            best = self.validation(self.state)
        except EvaluationStopped:
            # Saved without metrics; the resumed run begins with this evaluation.
            self._save(best=False)
            raise self._interrupted() from None
        self._settle_bad_files()
        self.tracker.scalars(self.state.step, self.state.metrics)
        self.say(f"step {self.state.step}: {phrase(self.state.metrics)}{' (best)' if best else ''}")
        self._save(best)

    def _save(self, best: bool) -> None:
        self.state.losses, self.state.loss_steps = self.meter.losses()
        files = self.state.files(self.description)
        if self.writer is None:
            for file in files.values():
                for tensor in file.tensors.values():
                    whole(tensor)  # as the first rank asks for it
            return
        root = self.config.data.root
        state = self.state.plain() | {"data_root": root and str(Path(root).expanduser().resolve())}
        self.writer.save(self.state.step, files, state, best)

    def _interrupted(self) -> Interrupted:
        error = interrupted(self.world.any(self.signals.stop), self._saved())
        if self.config.trainer.requeue and self.world.is_main:
            self.say(requeue())
        return error

    def _collapsed(self) -> Collapsed:
        bounds = self.config.collapse
        return Collapsed(
            f"step {self.state.step}: the ratio of similar blocks is above collapse.stop_above="
            f"{bounds.stop_above:g} ({bounds.legend}); saved {self._saved()}; "
            "a higher collapse.stop_above goes on"
        )

    def _saved(self) -> Path | str:
        """The newest checkpoint, once it is on the disk."""
        return "the checkpoint of the first rank" if self.writer is None else self.writer.newest()


def _wrapped(model: DeepViT, config: TrainConfig, world: World) -> Callable[[Tensor], Tensor]:
    """The model as it is trained: compiled where asked for, and with gradients exchanged between ranks."""
    forward: nn.Module | Callable[[Tensor], Tensor] = model.train()
    if world.size > 1 and not is_sharded(model):
        forward = replicate(model, config.model.image_size, world)
    return torch.compile(forward) if config.trainer.compile else forward


def phrase(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
