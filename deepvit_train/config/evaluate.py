"""What `deepvit-eval` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.data import DataConfig
from deepvit_train.config.foreign import ForeignKeys, Weights
from deepvit_train.config.option import option
from deepvit_train.config.recipe import Device, Precision
from deepvit_train.error import CheckpointError


@dataclass(kw_only=True, slots=True)
class EvalConfig(ForeignKeys):
    """Measure how accurate a checkpoint is on a folder of images."""

    checkpoint: str = option(
        "a run, of which the best checkpoint is taken, else the newest; a checkpoint; a weights "
        "file; or hf:ORG/NAME[@REVISION] of the Hugging Face hub",
        path=CheckpointError,
    )
    data: DataConfig
    weights: Weights = option(
        "which weights to evaluate; ema: the averaged ones; auto: ema if there are any, else live"
    )
    image_size: int | None = option(
        "evaluate at this image size, pixels; position embeddings are resampled; null: the model's own size",
        low=1,
        high=65536,
    )
    calibrate_images: int | None = option(
        "training images that BatchNorm's statistics are measured on anew; null: only if there are none",
        low=1,
    )
    report: bool = option(
        "whether to write RUN/evaluation/NAME/ as well: report.html, its figures, and a row for each image"
    )
    batch_size: int = option("images in a batch of each rank", low=1)
    precision: Precision = option(
        "number format of matrix products (autocast); softmax, norms and weights stay fp32"
    )
    device: Device = option("where to evaluate; auto: on CUDA if there is any")
    threads: int | None = option("CPU threads; null: as torch chooses", low=1, high=4096)
    timeout_s: float = option("seconds that a rank waits for the others before the command fails", above=0)
    limit_batches: int | None = option(
        "batches that each rank evaluates, spread over the classes, for trials; null: all", low=1
    )
