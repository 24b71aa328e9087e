"""Declare the keys of `optim` and `trainer`: the optimizer, and how long and on what a run trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deepvit_train.config.option import LARGEST, Choice, Section, option
from deepvit_train.error import ConfigError

SCHEDULE_FREE = "schedulefree_"  # begins the names of optimizers of the package schedulefree
# Optimizers that treat each number by itself, so that each rank can treat its part of a tensor.
SHARDABLE = ("adamw", "adam", "nadamw", "sgd", "lion")


class Precision(Choice):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Compile(Choice):
    none = "none"
    default = "default"
    reduce_overhead = "reduce_overhead"  # CUDA graphs: the host launches a whole step at once
    max_autotune = "max_autotune"  # the fastest tiles are looked for, which takes minutes

    @property
    def mode(self) -> str | None:
        """torch.compile's name of it; None where nothing is compiled."""
        return None if self == Compile.none else self.value.replace("_", "-")


class SelectBy(Choice):
    top1 = "top1"
    mean_class = "mean_class"  # the mean over classes of the accuracy in each
    loss = "loss"


class Device(Choice):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True, slots=True)
class OptimConfig(Section):
    name: str = option(
        "optimizer: a name of timm.optim.list_optimizers(), or schedulefree_adamw, _sgd or _radam"
    )
    lr: float = option("learning rate at the peak; it is never rescaled by the batch size", low=0, high=1000)
    weight_decay: float = option(
        "decoupled weight decay of parameters with two or more dimensions", low=0, high=1000
    )
    betas: list[float] | None = option(
        "decay rates of the optimizer's averages; null: its own, or it has none", low=0, below=1
    )
    eps: float | None = option("the optimizer's epsilon; null: its own, or it has none", above=0, high=1)
    options: dict[str, Any] = option("the optimizer's other arguments, as {momentum: 0.95, nesterov: true}")
    decay_theta: bool = option("whether Theta, the matrix that mixes the heads, has weight decay too")
    layer_decay: float = option(
        "learning rate of each block, as a share of that of the block after it; 1: all equal", above=0, high=1
    )
    mixing_rate: float = option(
        "learning rate of what mixes heads (Theta, its bias, its norm, what else a form of attention adds), "
        "as a multiple of the others'",
        above=0,
        high=1000,
    )
    freeze_blocks: int = option(
        "number of first blocks that are not trained, nor are stem and tokens then; 0: all are trained", low=0
    )
    head_only: bool = option("whether to train the classifier alone (linear probe)")

    @classmethod
    def prefix(cls) -> str:
        return "optim."

    @property
    def is_schedule_free(self) -> bool:
        """Whether the optimizer averages the weights by itself, in place of a falling rate."""
        return self.name.startswith(SCHEDULE_FREE)

    def check(self) -> None:
        if self.betas is not None and len(self.betas) not in (2, 3):
            raise ConfigError(f"optim.betas={self.betas}: needs two numbers, or three of some optimizers")
        for name, value in self.options.items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, (int, float)) and not (math.isfinite(each) and abs(each) <= LARGEST):
                    raise ConfigError(
                        f"optim.options={{{name}: {each}}}: must be finite, and at most {LARGEST:g}"
                    )


@dataclass(kw_only=True, slots=True)
class TrainerConfig(Section):
    epochs: int = option("epochs of warm-up and decay together", low=1)
    max_steps: int | None = option(
        "optimizer steps after which to stop; the schedule keeps its length; null: no limit", low=1
    )
    batch_size: int = option("images in an optimizer step, over all ranks", low=1)
    eval_batch_size: int = option("images in a batch of each rank in evaluation and calibration", low=1)
    accumulate: int | None = option(
        "parts of a batch that are computed one after the other to save memory; their gradients are added "
        "up; auto: as few as fit the memory when the run begins, which config.yaml then names",
        low=1,
    )
    precision: Precision = option(
        "number format of matrix products (autocast); softmax, norms and weights stay fp32"
    )
    device: Device = option("where to train; auto: on CUDA if there is any")
    threads: int | None = option("CPU threads; null: as torch chooses", low=1, high=4096)
    compile: Compile = option("how torch.compile compiles the model; true: default, false: none")
    deterministic: bool = option(
        "whether to use only GPU kernels that add in one order, so that a run repeats to the bit; slower"
    )
    sync_norm: bool = option(
        "whether re-attention's BatchNorm takes its statistics over the batches of all ranks"
    )
    shard: bool = option(
        "whether to spread parameters, gradients, averaged weights and optimizer state over the ranks (FSDP2)"
    )
    channels_last: bool = option(
        "whether images reach the stem's convolutions with their channels last in memory, as GPUs prefer"
    )
    grad_checkpointing: bool = option("whether to recompute blocks in the backward pass, to save memory")
    clip_grad: float | None = option("norm that longer gradients are clipped to; null: no clipping", above=0)
    ema_decay: float | None = option(
        "decay of the averaged weights (EMA); null: no averaged weights", low=0, below=1
    )
    ema_warmup: bool = option(
        "whether that decay rises from 0 to its value at the start, so that averages forget the first weights"
    )
    calibrate_images: int = option(
        "training images on which re-attention's BatchNorm is calibrated before each evaluation; 0: never",
        low=0,
    )
    eval_every_epochs: int = option("epochs from one evaluation to the next", low=1)
    select_by: SelectBy = option("which figure of an evaluation says which one is the best")
    patience: int | None = option(
        "evaluations in a row without a better one that end the run; null: it goes on", low=1
    )
    max_hours: float | None = option(
        "hours after which a start saves and ends; the same command goes on; null: no limit", above=0
    )
    log_every_steps: int = option("optimizer steps from one line of the log to the next", low=1)
    save_every_steps: int | None = option(
        "optimizer steps from one checkpoint to the next, besides one at each evaluation; null: only those",
        low=1,
    )
    probe_every_steps: int | None = option(
        "optimizer steps from one measurement of attention collapse to the next; null: never", low=1
    )
    keep_last: int = option("number of newest checkpoints to keep, besides the best", low=1)
    limit_batches: int | None = option(
        "steps of an epoch, and batches of an evaluation on each rank (spread over the classes), for trials; "
        "null: all",
        low=1,
    )
    timeout_s: float = option("seconds that a rank waits for the others before the run fails", above=0)
    report: bool = option("whether to write report.html and curves.png into the run's folder at its end")
    requeue: bool = option("whether to have SLURM queue the job again after a stop signal (scontrol requeue)")
    max_scaler_skips: int = option(
        "steps in a row that fp16's loss scaler may skip because of overflows; one more ends the run", low=0
    )

    @classmethod
    def prefix(cls) -> str:
        return "trainer."

    @property
    def parts(self) -> int:
        """Return how many parts a batch is computed in. Raises ConfigError while nobody has found it."""
        if self.accumulate is None:
            raise ConfigError(
                "trainer.accumulate=auto: only deepvit-train finds the number; nearest: trainer.accumulate=1"
            )
        return self.accumulate

    def check(self) -> None:
        if self.accumulate is None and self.shard:
            raise ConfigError(
                "trainer.accumulate=auto: is found by a step of the whole model, which trainer.shard=true "
                "spreads over the ranks; nearest: trainer.accumulate=1"
            )
        if self.shard and self.precision == Precision.fp16:
            raise ConfigError(
                "trainer.precision=fp16: sharded gradients are not scaled; nearest: trainer.precision=bf16, "
                "or trainer.shard=false"
            )
        if self.accumulate is not None and self.batch_size % self.accumulate:
            raise ConfigError(
                f"trainer.batch_size={self.batch_size} is not divisible by "
                f"trainer.accumulate={self.accumulate}; "
                "nearest: "
                f"trainer.batch_size={max(1, round(self.batch_size / self.accumulate)) * self.accumulate}"
            )
