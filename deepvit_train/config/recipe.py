"""The recipe (optimizer, schedule, loss) and the trainer."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.error import ConfigError


class OptimName(Choice):
    adamw = "adamw"


class CosineAxis(Choice):
    heads = "heads"  # the vector at each (query, key) runs over heads: the authors' code
    queries = "queries"  # the vector of each head and key runs over queries: the paper's Eq. 2


class Precision(Choice):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(Choice):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(kw_only=True, slots=True)
class OptimConfig(Section):
    name: OptimName = option("optimizer")
    lr: float = option("peak learning rate; never rescaled by the batch size", low=0, high=1000)
    weight_decay: float = option(
        "decoupled weight decay of parameters with two or more dimensions", low=0, high=1000
    )
    betas: list[float] = option("AdamW's two decay rates", low=0, below=1)
    eps: float = option("AdamW's epsilon", above=0, high=1)
    decay_theta: bool = option("whether weight decay holds for re-attention's mixing matrix")
    layer_decay: float = option(
        "factor of the learning rate from each block to the one before it; 1: none", above=0, high=1
    )
    freeze_blocks: int = option("first blocks that stay as they are, with stem and tokens; 0: none", low=0)
    head_only: bool = option("train the classifier alone (linear probe)")

    @classmethod
    def prefix(cls) -> str:
        return "optim."

    def check(self) -> None:
        if len(self.betas) != 2:
            raise ConfigError(f"optim.betas={self.betas}: needs two numbers")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig(Section):
    warmup_epochs: float = option("epochs of linear warm-up, part of trainer.epochs", low=0)
    warmup_lr: float = option("learning rate at the first step of the warm-up", low=0, high=1000)
    min_lr: float = option("learning rate at the end of the decay and during the cooldown", low=0, high=1000)
    cooldown_epochs: int = option("epochs at min_lr on top of trainer.epochs", low=0)

    @classmethod
    def prefix(cls) -> str:
        return "schedule."


@dataclass(kw_only=True, slots=True)
class LossConfig(Section):
    label_smoothing: float = option("share of the target spread over all classes", low=0, below=1)
    cosine_weight: float = option(
        "weight of the mean cosine between attention maps of consecutive blocks; 0: off", low=0, high=1000
    )
    cosine_axis: CosineAxis = option("what the vectors run over whose cosine is taken")
    cosine_pairs: int | None = option("first pairs of consecutive blocks it looks at; null: all", low=1)

    @classmethod
    def prefix(cls) -> str:
        return "loss."


@dataclass(kw_only=True, slots=True)
class TrainerConfig(Section):
    epochs: int = option("epochs of warm-up and decay", low=1)
    max_steps: int | None = option("stop after so many optimizer steps; the schedule keeps its length", low=1)
    batch_size: int = option("images an optimizer step, over all ranks", low=1)
    eval_batch_size: int = option("images a batch and rank in evaluation and calibration", low=1)
    accumulate: int = option("micro-batches whose gradients add up to a step", low=1)
    precision: Precision = option("autocast type; softmax, norms and weights stay fp32")
    device: Device = option("where to train; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)
    compile: bool = option("compile the model with torch.compile")
    sync_norm: bool = option("train re-attention's BatchNorm with the statistics of all ranks' batches")
    shard: bool = option("spread parameters, gradients, averages and optimizer state over the ranks (FSDP2)")
    grad_checkpointing: bool = option("recompute blocks in the backward pass to save memory")
    clip_grad: float | None = option("largest norm of the gradient; null: no clipping", above=0)
    ema_decay: float | None = option(
        "decay of the averaged weights after its warm-up; null: none", low=0, below=1
    )
    calibrate_images: int = option(
        "training images that re-attention's BatchNorm is calibrated on; 0: never", low=0
    )
    eval_every_epochs: int = option("epochs between evaluations", low=1)
    log_every_steps: int = option("optimizer steps between log lines", low=1)
    save_every_steps: int | None = option("also save every so many steps; null: at evaluations only", low=1)
    probe_every_steps: int | None = option(
        "steps between looks at attention collapse, on collapse.images; null: never", low=1
    )
    keep_last: int = option("newest checkpoints to keep, besides the best", low=1)
    limit_batches: int | None = option(
        "steps an epoch and batches an evaluation of each rank, for trials; null: all", low=1
    )
    timeout_s: float = option("seconds that a rank waits for the others before the run ends", above=0)
    requeue: bool = option("after a stop signal, ask SLURM to queue the job again (scontrol requeue)")
    max_scaler_skips: int = option("consecutive overflows that fp16's loss scaler may skip", low=0)

    @classmethod
    def prefix(cls) -> str:
        return "trainer."

    def check(self) -> None:
        if self.shard and self.precision == Precision.fp16:
            raise ConfigError(
                "trainer.precision=fp16: sharded gradients are not scaled; nearest: trainer.precision=bf16, "
                "or trainer.shard=false"
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"trainer.batch_size={self.batch_size} is not divisible by "
                f"trainer.accumulate={self.accumulate}; "
                "nearest: "
                f"trainer.batch_size={max(1, round(self.batch_size / self.accumulate)) * self.accumulate}"
            )
