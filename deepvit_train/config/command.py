"""Whole commands: what each can be told, besides `deepvit-bench` and `deepvit-study`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from deepvit_train.config.collapse import CollapseConfig, WatchConfig
from deepvit_train.config.data import AugmentConfig, DataConfig
from deepvit_train.config.model import AttentionConfig, Interpolation, ModelConfig, Pool, check_architecture
from deepvit_train.config.option import Choice, Section, option
from deepvit_train.config.preset import choices
from deepvit_train.config.recipe import (
    Device,
    LossConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    TrainerConfig,
)
from deepvit_train.error import ConfigError, nearest


class Weights(Choice):
    auto = "auto"  # the averaged weights where there are any
    live = "live"
    ema = "ema"


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section):
    """Everything that `deepvit-train` can be told."""

    model: ModelConfig
    attn: AttentionConfig
    data: DataConfig
    augment: AugmentConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    loss: LossConfig
    trainer: TrainerConfig
    collapse: WatchConfig
    seed: int = option("seed of weights, order, augmentation and dropout", low=0, high=2**31 - 1)
    name: str = option("name of the run")
    run_dir: str = option("folder of the run; the same folder again continues it")
    resume: str = option(
        "auto: continue run_dir if it was begun; never; or a checkpoint, or run whose newest, to start from"
    )

    def check(self) -> None:
        check_architecture(self.model, self.attn)
        if self.trainer.shard and self.attn.theta_shared:
            raise ConfigError(
                "attn.theta_shared=true: blocks that are sharded one by one share no Theta; nearest: "
                "trainer.shard=false"
            )
        if self.optim.freeze_blocks > self.model.depth:
            raise ConfigError(
                f"optim.freeze_blocks={self.optim.freeze_blocks} is more than "
                f"model.depth={self.model.depth}; nearest: optim.freeze_blocks={self.model.depth}"
            )
        if self.loss.cosine_weight and self.model.depth < 2:
            raise ConfigError("loss.cosine_weight compares blocks, and model.depth=1; nearest: model.depth=2")
        if self.data.name is None:
            raise ConfigError(f"data.name is not given; choices: data={', data='.join(choices('data'))}")
        if self.schedule.warmup_epochs >= self.trainer.epochs and self.schedule.warmup_epochs:
            raise ConfigError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs:g} leaves nothing of "
                f"trainer.epochs={self.trainer.epochs}; nearest: "
                f"schedule.warmup_epochs={self.trainer.epochs - 1}"
            )
        for name in ("name", "run_dir"):
            value = getattr(self, name)
            if not value.strip() or "=" in value or any(ord(letter) < 32 for letter in value):
                raise ConfigError(f"{name}={value!r}: must not be empty, nor hold '=' or control characters")
        if "/" in self.name:
            raise ConfigError(f"name={self.name!r}: must not hold '/'; use run_dir= for a folder elsewhere")


@dataclass(kw_only=True, slots=True)
class ForeignKeys(Section):
    """What the tensors of a weights file of other code do not show; files of our own say it themselves."""

    preset: str | None = option("model preset that a foreign weights file follows; null: none")
    heads: int | None = option(
        "attention heads of a foreign weights file; null: its Theta or preset says", low=1
    )
    transform_scale: bool | None = option("attn.transform_scale of a foreign weights file; null: as preset")
    residual_scale: float | None = option(
        "model.residual_scale of a foreign weights file; null: as preset", above=0, high=100
    )
    pool: Pool | None = option("model.pool of a foreign weights file; null: as preset, else cls")
    mean: list[float] | None = option("model.mean for a foreign weights file; null: as preset, else 0.5")
    std: list[float] | None = option("model.std for a foreign weights file; null: as preset, else 0.5")
    crop_pct: float | None = option(
        "model.crop_pct for a foreign weights file; null: as preset, else 0.9", above=0, high=1
    )
    interpolation: Interpolation | None = option(
        "model.interpolation for a foreign weights file; null: as preset, else bicubic"
    )

    def said(self) -> dict[str, Any]:
        """What is given, besides the preset."""
        names = {key.name for key in fields(ForeignKeys)} - {"preset"}
        return {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        known = choices("model")
        if self.preset is not None and self.preset not in known:
            raise ConfigError(
                f"preset={self.preset}: unknown{nearest(self.preset, known)} (choices: {', '.join(known)})"
            )


@dataclass(kw_only=True, slots=True)
class EvalConfig(ForeignKeys):
    """Everything that `deepvit-eval` can be told."""

    checkpoint: str = option(
        "a run folder (its best checkpoint, else its newest), a checkpoint folder, or a weights file"
    )
    data: DataConfig
    weights: Weights = option("which weights to evaluate; auto: the averaged ones where there are any")
    image_size: int | None = option(
        "evaluate at another image size, positions resampled; null: the model's own", low=1, high=65536
    )
    calibrate_images: int | None = option(
        "measure BatchNorm statistics anew on so many training images; null: where the checkpoint has none",
        low=1,
    )
    batch_size: int = option("images a batch and rank", low=1)
    precision: Precision = option("autocast type; softmax, norms and weights stay fp32")
    device: Device = option("where to evaluate; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)
    timeout_s: float = option("seconds that a rank waits for the others before it gives up", above=0)
    limit_batches: int | None = option("batches to evaluate, for trials; null: all", low=1)


@dataclass(kw_only=True, slots=True)
class ConvertConfig(ForeignKeys):
    """Everything that `deepvit-convert` can be told."""

    source: str = option("weights file of any known layout, or a checkpoint or run of this project")
    out: str = option("new folder that model.safetensors is written into")
    weights: Weights = option("which weights to take; auto: the averaged ones where there are any")


@dataclass(kw_only=True, slots=True)
class DataCheckConfig(Section):
    """Everything that `deepvit-data check` can be told."""

    root: str = option("folder that holds the split folders")
    data: DataConfig
    model: ModelConfig
    attn: AttentionConfig
    augment: AugmentConfig
    timing: bool = option("whether to measure where a training step's time goes")
    batch_size: int | None = option(
        "images a timed forward pass; null: 64 on CUDA, 4 on the CPU", low=1, high=65536
    )
    precision: Precision = option("autocast type of the timed step")
    device: Device = option("where the timed step runs; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)

    def check(self) -> None:
        check_architecture(self.model, self.attn)
        if self.data.root != self.root:
            raise ConfigError(f"data.root={self.data.root}: another folder than root={self.root}")


@dataclass(kw_only=True, slots=True)
class AnalyzeConfig(ForeignKeys):
    """Everything that `deepvit-analyze` can be told."""

    checkpoint: str | None = option("as in deepvit-eval; with model=timm:NAME that model's weights file")
    model: str | None = option("timm:NAME for any of timm's vision transformers; null: what checkpoint says")
    compare: str | None = option("a second checkpoint, or timm:NAME untrained, to put beside the first")
    out: str | None = option("folder for analysis.json, figures/ and report.html; null: RUN/analysis")
    data: DataConfig
    collapse: CollapseConfig
    weights: Weights = option("which weights to analyse; auto: the averaged ones where there are any")
    accuracy: bool = option("also evaluate on the whole split, with calibrated and with running statistics")
    report: bool = option("also draw figures and write report.html")
    batch_size: int = option("images whose maps are held at a time", low=1)
    eval_batch_size: int = option("images a batch when accuracy is evaluated", low=1)
    device: Device = option("where to run; auto: CUDA if there is any")
    threads: int | None = option("CPU threads of torch; null: torch's choice", low=1, high=4096)

    def check(self) -> None:
        ForeignKeys.check(self)
        if self.model is not None and not self.model.startswith("timm:"):
            raise ConfigError(
                f"model={self.model}: not of the form timm:NAME; nearest: model=timm:{self.model}"
            )
        if self.checkpoint is None and self.model is None:
            raise ConfigError("checkpoint is not given: add checkpoint=RUN, or model=timm:NAME")
        if self.model is not None and self.data.name is None:
            raise ConfigError(
                f"data is not given: model={self.model} needs data=imagefolder data.root=FOLDER"
            )
        if self.model is not None and self.checkpoint is None and self.out is None:
            raise ConfigError(f"out is not given: model={self.model} without a checkpoint needs out=FOLDER")


@dataclass(kw_only=True, slots=True)
class DataDemoConfig(Section):
    """Everything that `deepvit-data demo` can be told."""

    out: str = option("new folder to write train/ and val/ into")


@dataclass(kw_only=True, slots=True)
class DataFashionMnistConfig(Section):
    """Everything that `deepvit-data fashion-mnist` can be told."""

    out: str = option("new folder to write train/ and val/ into")
    source: str | None = option(
        "folder of the four idx files, gzipped or not; null: the Debian package dataset-fashion-mnist"
    )
