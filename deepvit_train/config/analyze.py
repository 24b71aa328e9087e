"""What `deepvit-analyze` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.config.data import DataConfig
from deepvit_train.config.foreign import ForeignKeys, Weights
from deepvit_train.config.option import option
from deepvit_train.config.recipe import Device
from deepvit_train.error import CheckpointError, ConfigError, OutputError


@dataclass(kw_only=True, slots=True)
class AnalyzeConfig(ForeignKeys):
    """Measure whether a model's attention maps become alike, and write figures and a report."""

    checkpoint: str | None = option(
        "run, checkpoint, weights file or hf:ORG/NAME, as for deepvit-eval; with model, the weights file of "
        "that model; null: only if model is given",
        path=CheckpointError,
    )
    model: str | None = option(
        "timm:NAME for one of timm's vision transformers; null: the model of checkpoint"
    )
    compare: str | None = option(
        "a second checkpoint to show beside the first, or timm:NAME for that model untrained",
        path=CheckpointError,
    )
    out: str | None = option(
        "folder that analysis.json, figures/ and report.html are written to; null: analysis/ in the run",
        path=OutputError,
    )
    data: DataConfig
    collapse: CollapseConfig
    weights: Weights = option(
        "which weights to analyse; ema: the averaged ones; auto: ema if there are any, else live"
    )
    accuracy: bool = option(
        "whether to measure accuracy too, once with calibrated and once with running statistics"
    )
    features: bool = option(
        "whether to classify by the features of each block, with nearest neighbours and a linear probe"
    )
    features_images: int | None = option(
        "training images for that, chosen at random; memory holds their features; null: all", low=10
    )
    features_eval_images: int | None = option(
        "images of the split that are classified, in whole batches spread over the classes; null: all",
        low=1,
    )
    features_probe: bool = option("whether features=true fits linear probes, which take most of its time")
    prune: bool = option(
        "whether to leave blocks out, one more each time, and measure accuracy: those first that are missed "
        "least"
    )
    report: bool = option("whether to draw figures and write report.html")
    batch_size: int = option("images whose attention maps are in memory at a time", low=1)
    eval_batch_size: int = option("images in a batch while accuracy or features are measured", low=1)
    device: Device = option("where to run; auto: on CUDA if there is any")
    threads: int | None = option("CPU threads; null: as torch chooses", low=1, high=4096)

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
