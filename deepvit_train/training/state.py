"""The training state: all that a resumed run needs, to go on as if it had never stopped.

Random draws need no state: each comes from the seed, the step and the sample (determinism.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor

from deepvit_train.config.recipe import Precision
from deepvit_train.config.train import TrainConfig
from deepvit_train.distributed.parallel import placed_like, shard
from deepvit_train.distributed.world import World
from deepvit_train.error import CheckpointError
from deepvit_train.evaluation.calibration import Statistics
from deepvit_train.models import DeepViT
from deepvit_train.run import schema
from deepvit_train.run.checkpoint import (
    STATE,
    WEIGHT_FILES,
    check_statistics,
    read_calibrated,
    read_state,
    signed_file,
)
from deepvit_train.run.saving import TensorFile
from deepvit_train.run.tensor import check_finite, check_fit, read_tensors
from deepvit_train.training.optimizer import build_optimizer
from deepvit_train.training.optimizer_state import make_state, optimizer_tensors, set_state, without_state
from deepvit_train.training.plan import Plan
from deepvit_train.training.recipe import build_ema
from deepvit_train.training.schedule import build_schedule, go_on_with, learning_rate_after, plain_schedule
from deepvit_train.training.schedule_free import ScheduleFreeAverage


@dataclass
class TrainState:
    """All that training changes, step by step."""

    model: DeepViT
    ema: ModelEmaV3 | ScheduleFreeAverage | None
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    scaler: torch.amp.GradScaler
    step: int = 0
    scaler_skips: int = 0  # consecutive overflows
    evaluated_step: int = -1
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation at evaluated_step
    best: dict[str, float] = field(default_factory=dict)  # the metrics of the best evaluation, and its step
    calibrated: dict[str, Statistics] = field(
        default_factory=dict
    )  # for live and ema weights at evaluated_step
    class_weights: list[float] | None = None  # of the loss; None: equal ones
    teacher: str | None = None  # SHA-256 of the model that is learned from
    worse: int = 0  # evaluations in a row since the best one
    hours: float = 0.0  # of training, over all starts with trainer.max_hours
    bad_files: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # sums since the last log line, of each rank
    loss_steps: int = 0
    plain_losses: list[float] = field(default_factory=list)  # the same without smoothing and penalty
    saved_rate: float | None = None  # the learning rate that was to come when the state was saved

    def weights(self) -> dict[str, DeepViT]:
        """Return the models to evaluate, by name: 'live', and 'ema' if there are averaged weights."""
        ema: Any = self.ema
        if isinstance(ema, ScheduleFreeAverage):
            ema.refresh(self.model, self.optimizer)
        return {"live": self.model} if ema is None else {"live": self.model, "ema": ema.module}

    def files(self, header: dict[str, str]) -> dict[str, TensorFile]:
        """Return the tensors of a checkpoint by file name. The files of weights get the header."""
        files = {"optimizer": TensorFile(optimizer_tensors(self.model, self.optimizer))}
        for name, model in self.weights().items():
            files[WEIGHT_FILES[name]] = TensorFile(model.state_dict(), header)
        return files | self.evaluation_files()

    def evaluation_files(self) -> dict[str, TensorFile]:
        """Return the tensors that an evaluation of this very state adds: statistics, if it measured any."""
        if not self.calibrated or self.evaluated_step != self.step:
            return {}
        flat = {
            f"{name}.{key}": value for name, stats in self.calibrated.items() for key, value in stats.items()
        }
        return {"calibrated": TensorFile(flat)}

    def plain(self) -> dict[str, Any]:
        """Return the rest of a checkpoint, as plain data for JSON."""
        return {
            "scaler": self.scaler.state_dict(),
            "scaler_skips": self.scaler_skips,
            "evaluated_step": self.evaluated_step,
            "metrics": self.metrics,
            "best": self.best,
            "class_weights": self.class_weights,
            "teacher": self.teacher,
            "worse": self.worse,
            "hours": self.hours,
            "bad_files": self.bad_files,
            "losses": self.losses,
            "loss_steps": self.loss_steps,
            "plain_losses": self.plain_losses,
            "learning_rate": learning_rate_after(self.schedule, self.step),
            "schedule": plain_schedule(self.schedule),
        }

    def restore(self, checkpoint: Path) -> None:
        """Take over the state of a verified checkpoint. Raises CheckpointError if it does not fit."""
        state = schema.fitting(read_state(checkpoint), schema.RESUMED, checkpoint / STATE)
        stepped = state["scaler_skips"] < state["step"]  # a skipped step leaves no trace
        _load_optimizer(self.model, self.optimizer, signed_file(checkpoint, "optimizer"), stepped)
        for name, model in self.weights().items():
            load_weights(model, signed_file(checkpoint, WEIGHT_FILES[name]))
        self.step = state["step"]
        if state["scaler"]:  # empty unless the checkpoint was trained in fp16
            self.scaler.load_state_dict(state["scaler"])
        self.scaler_skips = state["scaler_skips"]
        self.evaluated_step = state["evaluated_step"]
        self.metrics = state["metrics"]
        self.best = state["best"]
        self.worse, self.hours = state.get("worse", 0), state.get("hours", 0.0)
        self.bad_files = state["bad_files"]
        # Checkpoints of earlier versions have none of these.
        self.losses, self.loss_steps = state.get("losses", []), state.get("loss_steps", 0)
        self.plain_losses = state.get("plain_losses", [])
        self.saved_rate = state.get("learning_rate")
        self.calibrated = read_calibrated(checkpoint)
        for statistics in self.calibrated.values():
            check_statistics(self.model, statistics, checkpoint)
        go_on_with(self.schedule, state.get("schedule"), self.step, self.saved_rate)
        self.schedule.step_update(self.step)


def build_state(model: DeepViT, config: TrainConfig, plan: Plan, world: World) -> TrainState:
    """Build the averaged weights, the optimizer and the schedule of a model at step 0.

    With trainer.shard the model and its average are spread over the ranks in place; otherwise the model is on
    the device already.
    """
    sharded = is_to_be_sharded(config, world)
    ema = build_ema(model, config.trainer.ema_decay, config.trainer.ema_warmup, foreach=not sharded)
    if sharded:
        shard(model, model.blocks, world)
        if ema is not None:
            shard(ema.module, ema.module.blocks, world)
    optimizer = build_optimizer(model, config.optim)
    return TrainState(
        model=model,
        ema=ScheduleFreeAverage(model) if config.optim.is_schedule_free else ema,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.schedule, config.trainer.epochs, plan.steps_per_epoch),
        scaler=torch.amp.GradScaler(world.device.type, enabled=config.trainer.precision == Precision.fp16),
    )


def is_to_be_sharded(config: TrainConfig, world: World) -> bool:
    """Return whether the model is to be spread over the ranks: as asked for, if there are several."""
    return config.trainer.shard and world.size > 1


def load_weights(model: DeepViT, file: Path) -> None:
    """Load a weights file into a model of the same shape. Raises CheckpointError."""
    own = model.state_dict()
    tensors = _checked(own, file, read_tensors(file))
    model.load_state_dict({name: placed_like(own[name], value) for name, value in tensors.items()})


def _load_optimizer(model: DeepViT, optimizer: torch.optim.Optimizer, file: Path, stepped: bool) -> None:
    """Load the optimizer's state, or none if no step was made yet. The weights must be loaded afterwards."""
    make_state(optimizer)
    expected, held = optimizer_tensors(model, optimizer), read_tensors(file)
    unreached = without_state(expected, held) if held else set()
    for name in unreached:
        del optimizer.state[model.get_parameter(name)]
    expected = optimizer_tensors(model, optimizer) or expected
    tensors = _checked(expected, file, held, may_be_empty=not stepped)
    if tensors:
        set_state(model, optimizer, tensors)
    else:
        optimizer.state.clear()


def _checked(
    expected: Mapping[str, Tensor], file: Path, tensors: dict[str, Tensor], may_be_empty: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises CheckpointError unless they are those expected, and finite."""
    try:
        if tensors or not may_be_empty:
            check_fit(expected, tensors, exact=True)
        check_finite(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return tensors
