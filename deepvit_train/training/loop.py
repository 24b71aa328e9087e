"""The training loop: steps, and what is due between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepvit_train.config.train import TrainConfig
from deepvit_train.console import progress_bar
from deepvit_train.data.bad_files import BadFiles, TooManyBadFiles
from deepvit_train.data.dataset import Batch
from deepvit_train.data.patience import DataLost, LoaderLost, WaitInterrupted
from deepvit_train.data.transform import denormalise
from deepvit_train.distributed.parallel import gathered, is_sharded, replicate, told_of
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError, Interrupted, NotFiniteError, OutputError, UserError, explained
from deepvit_train.models import DeepViT
from deepvit_train.run.tracking import Tracker
from deepvit_train.training.distillation import Distillation
from deepvit_train.training.due import Due, agree_on_due
from deepvit_train.training.finite import FiniteGuard, first_non_finite
from deepvit_train.training.forecast import Forecast
from deepvit_train.training.interruption import (
    EvaluationStopped,
    interrupted,
    receive,
    requeue,
)
from deepvit_train.training.loss import build_criterion
from deepvit_train.training.meter import Meter
from deepvit_train.training.optimizer import learning_rate
from deepvit_train.training.recipe import build_mixup
from deepvit_train.training.regulariser import build_regulariser
from deepvit_train.training.run import Run
from deepvit_train.training.saver import Saver
from deepvit_train.training.step import StepOptions, StepResult, train_step
from deepvit_train.training.validation import Validation, phrase
from deepvit_train.training.watch import CollapseWatch

GRID_IMAGES = 36  # augmented training images shown in TensorBoard


@dataclass(kw_only=True)
class Trainer:
    """The loop over steps, and what is due between them."""

    run: Run
    validation: Validation
    bad: BadFiles
    watch: CollapseWatch
    tracker: Tracker
    saver: Saver
    distillation: Distillation | None = None
    meter: Meter = field(init=False)
    forecast: Forecast = field(init=False)
    stepped: bool = field(init=False, default=False)  # since this start
    evaluated_before: bool = field(init=False, default=False)  # since this start
    hours_before: float = field(init=False, default=0.0)  # of training, before this start

    def __post_init__(self) -> None:
        self.meter = Meter(
            self.run.world, self.run.state.losses, self.run.state.loss_steps, self.run.state.plain_losses
        )
        self.forecast = Forecast(self.run.plan, self.meter)
        self.hours_before = self.run.state.hours

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train from the state's step to the plan's end, or until trainer.patience or max_hours end it.

        Raises Interrupted after a stop signal and Collapsed after an alarm, both once the state is saved.
        Raises NotFiniteError, and DataError where every training image is bad, with the last checkpoint as it
        was. Whatever goes wrong in an evaluation, the state is saved before.
        """
        config, plan, state = self.run.config, self.run.plan, self.run.state
        options = self._step_options()
        guard = FiniteGuard(self.run.world, scaled=state.scaler.is_enabled())
        with self.meter.paused():
            forward = _wrapped(state.model, config, self.run.world)
            if 0 < state.step != state.evaluated_step and plan.evaluates(state.step):
                self._save_and_evaluate()  # the run was stopped between the step and its evaluation
            if state.step == 0 and plan.probes(0):
                self.watch.look(state)
        with progress_bar() as progress:
            bar = progress.add_task("training", total=plan.total_steps, completed=state.step)
            rests = False
            while state.step < plan.total_steps and not self.run.out_of_patience and not rests:
                asked = time.perf_counter()
                micro_batches = self._receive(batches, guard)
                waited_s = time.perf_counter() - asked
                self._look_at(micro_batches)
                result, due = self._advance(forward, micro_batches, options, guard)
                plain = result.cross_entropy if options.separated else None
                self.meter.add(result.loss, config.trainer.batch_size, waited_s, plain)
                progress.update(bar, completed=state.step)
                if due.logs:
                    self._log(result, options)
                if (line := self.forecast.line(state.step)) is not None:
                    self.run.say(line)
                self._act(due)
                rests = due.rests

    def _receive(self, batches: Iterator[Batch], guard: FiniteGuard) -> list[Batch]:
        """Wait for the batches of a step.

        Raises Interrupted, DataError and LoaderLost, each once the state is saved.
        """
        run = self.run

        def save() -> None:
            self._settle_bad_files(guard)
            self._save_if_new(guard)

        try:
            return receive(batches, run.config.trainer.parts, run.signals, run.world, save)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}; last good checkpoint: {self.saver.newest()}") from None
        except WaitInterrupted:
            raise self._interrupted() from None
        except DataLost as error:
            raise DataError(f"{error}\nsaved {self.saver.newest()}; the same command goes on") from None
        except LoaderLost as error:
            raise LoaderLost(f"{error}; saved {self.saver.newest()}") from None

    def _advance(
        self,
        forward: Callable[..., Any],
        batches: list[Batch],
        options: StepOptions,
        guard: FiniteGuard,
    ) -> tuple[StepResult, Due]:
        """Do one step and find out what is due after it.

        Raises NotFiniteError, which names where in the model the first such value appeared.
        """
        world, plan, state = self.run.world, self.run.plan, self.run.state
        try:
            logs = plan.logs(state.step + 1)
            result = train_step(state, forward, batches, world, options, guard, logs, not self.stepped)
            self._warn_once(result)
            alarm = False
            if plan.probes(state.step):  # only then: a pause waits for the GPU
                with self.meter.paused():
                    alarm = self.watch.look(state)
            due = agree_on_due(self.run, alarm, lost=self.tracker.failure is not None)
            if due.logs or due.saves:
                guard.check()
            if due.logs or due.saves or world.size == 1:
                self._settle_bad_files(guard)
        except NotFiniteError as error:
            with gathered(state.model) as model:
                found = first_non_finite(model, batches, world, options.precision)
            where = ", ".join(sorted(world.union(found))) or "the backward pass"
            raise NotFiniteError(
                f"{error}; first in {where}; last good checkpoint: {self.saver.newest()}"
            ) from None
        return result, due

    def _warn_once(self, result: StepResult) -> None:
        """After the first step of a start, name the parameters that no gradient reached."""
        if result.unreached:
            self.run.say(f"warning: no gradient reaches: {told_of(result.unreached)}")
        self.stepped = True

    def _act(self, due: Due) -> None:
        """Evaluate, save, or end the run, as is due."""
        if due.evaluates:
            with self.meter.paused():
                self._save_and_evaluate()
        elif due.saves:
            self._save()
        if due.stops:
            raise self._interrupted()
        if due.alarms:
            raise self.watch.error(self.run.state.step, self.saver.newest())
        if due.fails:
            failure = self.tracker.failure or "the first rank can't write its curves"
            raise OutputError(f"{failure}; saved {self.saver.newest()}; the same command goes on")

    def _step_options(self) -> StepOptions:
        config = self.run.config
        return StepOptions(
            seed=config.seed,
            precision=config.trainer.precision,
            label_smoothing=config.loss.label_smoothing,
            mixup=build_mixup(
                config.augment,
                config.loss.label_smoothing,
                self.validation.classes,
                self.run.plan.micro_batch,
            ),
            clip_grad=config.trainer.clip_grad,
            max_scaler_skips=config.trainer.max_scaler_skips,
            regulariser=build_regulariser(config.loss, config.model.depth),
            criterion=build_criterion(config.loss, self.run.state.class_weights, self.run.world.device),
            distillation=self.distillation,
            channels_last=config.trainer.channels_last,
        )

    def _look_at(self, batches: list[Batch]) -> None:
        """Show the first images, and note the bad files of every batch."""
        if self.run.state.step == 0:
            shown = denormalise(batches[0].images[:GRID_IMAGES], self.run.config.model.preprocessing)
            self.tracker.images("train/images", shown, step=0)
        for batch in batches:
            self.bad.note(batch.bad)

    def _settle_bad_files(self, guard: FiniteGuard) -> None:
        """Name the new bad files. Raises DataError, for too many of them once the state is saved."""
        state = self.run.state
        try:
            found = self.bad.settle()
        except TooManyBadFiles as error:
            self._save_if_new(guard)
            raise DataError(f"{error}\nsaved {self.saver.newest()}; a higher data.max_bad goes on") from None
        if found:
            self.tracker.scalars(state.step, {"train/bad_files": len(state.bad_files)})

    def _log(self, result: StepResult, options: StepOptions) -> None:
        """Log the averages since the last line, and the norm and the parts of the loss of the last step."""
        state, plan = self.run.state, self.run.plan
        scalars = self.meter.take(learning_rate(state.optimizer), result.grad_norm)
        if options.regulariser is not None:
            scalars["train/cosine_penalty"] = result.penalty.item()  # of this rank alone
        if options.distillation is not None:
            scalars["train/distillation"] = result.distillation.item()  # of this rank alone
        if result.query_key is not None:
            ratios = result.query_key.clamp(min=1e-30)
            scalars["train/query_key_gradient"] = ratios.log().mean().exp().item()
            scalars["train/query_key_gradient_least"] = ratios.min().item()
        self.tracker.scalars(state.step, scalars)
        self.run.say(
            f"step {state.step}/{plan.total_steps}  epoch {plan.epoch(state.step):.2f}  "
            f"loss {scalars['train/loss']:.4f}  "
            f"lr {scalars['train/lr']:.2e}  {scalars['train/images_per_s']:.0f} images/s"
        )

    def _save_and_evaluate(self) -> None:
        """Save the state, evaluate it, log the metrics, and add them to the checkpoint.

        A failing evaluation costs no step: the next start begins with it. Raises Interrupted after a stop.
        """
        state = self.run.state
        if self.saver.saved_step != state.step:
            self._save()
        if not self.evaluated_before:
            # If this first evaluation is more than the memory holds, the system may kill the process in it.
            self.saver.wait()
        best, scalars = self._evaluate()
        self.evaluated_before = True
        self.tracker.scalars(state.step, state.metrics | scalars)
        which = "" if state.ema is None else ", by the averaged weights"
        classes = self.validation.classes - len(self.validation.absent)
        line = phrase(state.metrics, classes)
        self.run.say(f"step {state.step}: {line}{f' (best{which})' if best else ''}")
        self.saver.complete(best)

    def _evaluate(self) -> tuple[bool, dict[str, float]]:
        """Evaluate the state. Returns whether it is the best so far, and the scalars of calibration."""
        state = self.run.state
        try:
            with explained("evaluation"):
                best = self.validation(state)
                bad = {"train/bad_files": float(len(state.bad_files))} if self.bad.settle() else {}
        except EvaluationStopped:
            raise self._interrupted() from None
        except UserError as error:
            first, *rest = str(error).splitlines()
            saved = f"saved {self.saver.newest()}; the same command begins with this evaluation"
            error.args = (f"evaluation of step {state.step}: {first}\n{'; '.join([*rest, saved])}",)
            raise
        return best, bad

    def _save(self) -> None:
        """Begin to write a checkpoint. All ranks must call this."""
        state = self.run.state
        state.losses, state.loss_steps, state.plain_losses = self.meter.losses()
        if self.run.config.trainer.max_hours is not None:  # else equal runs have equal states
            state.hours = self.hours_before + self.run.hours
        self.saver.save()

    def _save_if_new(self, guard: FiniteGuard) -> None:
        """Save a state that no checkpoint holds. Raises NotFiniteError for one that is not worth it."""
        guard.check()
        if 0 < self.run.state.step != self.saver.saved_step:
            self._save()

    def _interrupted(self) -> Interrupted:
        saved = self.saver.newest() if self.run.state.step else "nothing, because no step was done"
        error = interrupted(self.run.world.any(self.run.signals.stop), saved)
        if self.run.config.trainer.requeue and self.run.world.is_main:
            self.run.say(requeue())
        return error


def _wrapped(model: DeepViT, config: TrainConfig, world: World) -> Callable[[Tensor], Tensor]:
    """Wrap the model for training: ranks exchange gradients, and it is compiled if that is asked for."""
    forward: nn.Module | Callable[[Tensor], Tensor] = model.train()
    if world.size > 1 and not is_sharded(model):
        forward = replicate(model, config.model.image_size, world)
    mode = config.trainer.compile.mode
    if mode is None:
        return forward
    # torch compiles one code eight times in a process, then runs it uncompiled. All runs of `-m` are in one.
    torch.compiler.reset()
    return torch.compile(forward, mode=mode)
