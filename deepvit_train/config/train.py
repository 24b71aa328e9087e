"""What `deepvit-train` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.collapse import WatchConfig
from deepvit_train.config.data import AugmentConfig, DataConfig
from deepvit_train.config.distill import DistillConfig
from deepvit_train.config.foreign import CLASSES
from deepvit_train.config.loss import LossConfig
from deepvit_train.config.model import AttentionConfig, ModelConfig, check_architecture
from deepvit_train.config.option import Choice, Section, option
from deepvit_train.config.preset import choices
from deepvit_train.config.recipe import SHARDABLE, OptimConfig, TrainerConfig
from deepvit_train.config.schedule import ScheduleConfig
from deepvit_train.error import CheckpointError, ConfigError, DataError, OutputError


class TrackerName(Choice):
    tensorboard = "tensorboard"
    csv = "csv"
    trackio = "trackio"
    wandb = "wandb"
    mlflow = "mlflow"


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section):
    """Train a vision transformer on a folder of images."""

    model: ModelConfig
    attn: AttentionConfig
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    loss: LossConfig
    trainer: TrainerConfig
    collapse: WatchConfig
    distill: DistillConfig
    seed: int = option(
        "random seed of weights, order of images, augmentation and dropout", low=0, high=2**31 - 1
    )
    name: str = option("name of the run; a part of run_dir unless that is given")
    run_dir: str = option("folder that the run is written to", path=OutputError)
    tracker: list[TrackerName] = option(
        "where curves go: TensorBoard always, and to each other one that is named: tracker=[csv,wandb]"
    )
    classes: str | None = option(f"of model.weights: {CLASSES}", path=DataError)
    download: bool = option(
        "whether model.weights=timm:NAME or hf:ORG/NAME is fetched where it is not in its cache"
    )
    resume: str = option(
        "auto: continue the run in run_dir, or begin one if there is none; never: begin one, and fail if "
        "there is one; or a path to continue from: a checkpoint, or a run, whose newest checkpoint is taken. "
        "A run in run_dir comes before the path",
        path=CheckpointError,
    )

    def check(self) -> None:
        check_architecture(self.model, self.attn)
        if self.trainer.shard and self.attn.theta_shared:
            raise ConfigError(
                "attn.theta_shared=true: blocks that are sharded one by one share no Theta; nearest: "
                "trainer.shard=false"
            )
        self._check_optimizer()
        if self.optim.freeze_blocks > self.model.depth:
            raise ConfigError(
                f"optim.freeze_blocks={self.optim.freeze_blocks} is more than "
                f"model.depth={self.model.depth}; nearest: optim.freeze_blocks={self.model.depth}"
            )
        if self.loss.cosine_weight and self.model.depth < 2:
            raise ConfigError("loss.cosine_weight compares blocks, and model.depth=1; nearest: model.depth=2")
        if self.data.name is None:
            raise ConfigError(f"data.name is not given; choices: data={', data='.join(choices('data'))}")
        for name in ("name", "run_dir"):
            value = getattr(self, name)
            if not value.strip() or any(ord(letter) < 32 for letter in value):
                raise ConfigError(f"{name}={value!r}: must not be empty, nor hold control characters")
        if "/" in self.name:
            raise ConfigError(f"name={self.name!r}: must not hold '/'; use run_dir= for a folder elsewhere")

    def _check_optimizer(self) -> None:
        if self.optim.is_schedule_free and self.trainer.ema_decay is not None:
            raise ConfigError(
                f"trainer.ema_decay={self.trainer.ema_decay:g}: {self.optim.name} averages the weights "
                "itself; nearest: trainer.ema_decay=null"
            )
        if self.trainer.shard and self.optim.name not in SHARDABLE:
            raise ConfigError(
                f"trainer.shard=true: optim.name={self.optim.name} needs whole tensors; nearest: "
                f"trainer.shard=false (sharded: {', '.join(SHARDABLE)})"
            )

    def check_typed(self, typed: set[str]) -> None:
        self.schedule.check_typed(typed)
        self.loss.check_typed(typed)
        self.distill.check_typed(typed)
        epochs, warmup = self.trainer.epochs, self.schedule.warmup_epochs
        if "schedule.warmup_epochs" in typed and warmup != self.schedule.warmup_within(epochs):
            raise ConfigError(
                f"schedule.warmup_epochs={warmup:g} leaves nothing of trainer.epochs={epochs}; nearest: "
                f"schedule.warmup_epochs={epochs - 1}"
            )
