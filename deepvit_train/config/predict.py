"""What `deepvit-predict` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.data import DataConfig
from deepvit_train.config.foreign import ForeignKeys, Weights
from deepvit_train.config.option import Choice, option
from deepvit_train.config.recipe import Device, Precision
from deepvit_train.error import CheckpointError, ConfigError, DataError, OutputError


class RowFormat(Choice):
    csv = "csv"  # a line of names, then a line for each image
    jsonl = "jsonl"  # a JSON object a line


@dataclass(kw_only=True, slots=True)
class PredictConfig(ForeignKeys):
    """Tell the classes of images: names and probabilities, as CSV or as JSON lines."""

    checkpoint: str = option(
        "a run, of which the best checkpoint is taken, else the newest; a checkpoint; a weights "
        "file; or hf:ORG/NAME[@REVISION] of the Hugging Face hub",
        path=CheckpointError,
    )
    images: str | None = option(
        "an image; a folder, with images at any depth; a .tar file; or -, for a list of images on stdin, one "
        "a line; null: the split that deepvit-eval evaluates",
        path=DataError,
    )
    out: str | None = option("file that the rows are written into; null: stdout", path=OutputError)
    format: RowFormat | None = option(
        "csv, or jsonl for a JSON object a line; null: by out's ending, else csv"
    )
    top: int = option("classes that are told of each image, the likeliest first", low=1)
    features: bool = option(
        "whether to write what the classifier reads as well, a row an image, into OUT.npy (needs out)"
    )
    attention: str | None = option(
        "new folder for a PNG of each image, overlaid with what the last block's class token attends to; "
        "null: none",
        path=OutputError,
    )
    data: DataConfig
    weights: Weights = option(
        "which weights to use; ema: the averaged ones; auto: ema if there are any, else live"
    )
    batch_size: int = option("images in a batch", low=1)
    precision: Precision = option(
        "number format of matrix products (autocast); softmax, norms and weights stay fp32"
    )
    device: Device = option("where to predict; auto: on CUDA if there is any")
    threads: int | None = option("CPU threads; null: as torch chooses", low=1, high=4096)

    def check(self) -> None:
        ForeignKeys.check(self)
        if self.features and self.out is None:
            raise ConfigError("features=true needs out=FILE: the features are written beside it")

    @property
    def rows_as(self) -> RowFormat:
        """Return how rows are written: as asked for, else as out's ending says."""
        if self.format is not None:
            return self.format
        is_json = (self.out or "").lower().endswith((".jsonl", ".json", ".ndjson"))
        return RowFormat.jsonl if is_json else RowFormat.csv
