"""What `deepvit-export` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.data import DataConfig
from deepvit_train.config.foreign import ForeignKeys, Weights
from deepvit_train.config.option import Choice, option
from deepvit_train.error import CheckpointError, ConfigError, OutputError


class ExportFormat(Choice):
    onnx = "onnx"  # for ONNX Runtime and whatever else reads ONNX
    pt2 = "pt2"  # for torch.export.load, where there is torch and nothing of this project
    timm = "timm"  # for timm.create_model("local-dir:..."); plain attention alone


class NumberType(Choice):
    fp32 = "fp32"
    fp16 = "fp16"  # half the size; inputs and outputs stay fp32
    int8 = "int8"  # linear layers in 8 bits, their inputs quantised batch by batch


@dataclass(kw_only=True, slots=True)
class ExportConfig(ForeignKeys):
    """Write a model as a file that other programs run, and prove there that it gives the same answers."""

    checkpoint: str = option(
        "a run, of which the best checkpoint is taken, else the newest; a checkpoint; a weights "
        "file; or hf:ORG/NAME[@REVISION] of the Hugging Face hub",
        path=CheckpointError,
    )
    out: str = option(
        "new folder for the file and for model.json, which says what it is and how it was checked",
        path=OutputError,
    )
    push: str | None = option(
        "where the folder goes as well, with a model card: hf:ORG/NAME of the Hugging Face hub, or a new "
        "folder; null: nowhere",
        path=OutputError,
    )
    private: bool = option("whether a repository that push makes is seen by its owner alone")
    format: ExportFormat = option("onnx, pt2 (torch.export) or timm")
    numbers: NumberType = option("type of the numbers in the file; fp16 and int8 are for onnx")
    data: DataConfig
    weights: Weights = option(
        "which weights to export; ema: the averaged ones; auto: ema if there are any, else live"
    )
    check_images: int | None = option(
        "images of data.split that both programs see, spread over the classes, in whole batches; null: all",
        low=1,
    )
    tolerance: float | None = option(
        "largest difference of logits that is accepted, times the largest logit where that is above 1; "
        "null: for fp32 1e-4, or 4 times the model's own rounding if that is more; for fp16 and int8 any",
        above=0,
    )
    accuracy_loss: float = option(
        "largest loss of top-1 accuracy that is accepted, as a share of the images", low=0, high=1
    )
    batch_size: int = option("images in a batch of the check", low=2)
    threads: int | None = option("CPU threads of both programs; null: as torch chooses", low=1, high=4096)

    def check(self) -> None:
        ForeignKeys.check(self)
        if self.numbers != NumberType.fp32 and self.format != ExportFormat.onnx:
            raise ConfigError(
                f"numbers={self.numbers}: format={self.format} is written in fp32; nearest: format=onnx"
            )
