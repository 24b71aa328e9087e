"""What `deepvit-convert` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.data import DataConfig
from deepvit_train.config.foreign import ForeignKeys, Weights
from deepvit_train.config.option import option
from deepvit_train.config.recipe import Device
from deepvit_train.error import CheckpointError, ConfigError, OutputError


@dataclass(kw_only=True, slots=True)
class ConvertConfig(ForeignKeys):
    """Turn weights of any known layout into one file that says itself what its model is."""

    source: str = option(
        "weights file of any known layout, or a checkpoint or run of this project; or hf:ORG/NAME[@REVISION]",
        path=CheckpointError,
    )
    out: str = option("new folder that model.safetensors is written into", path=OutputError)
    average: list[str] = option(
        "other weights of the same shape and classes; the mean of all is written. BatchNorm over maps is "
        "then calibrated on training images"
    )
    data: DataConfig
    weights: Weights = option(
        "which weights to take; ema: the averaged ones; auto: ema if there are any, else live"
    )
    batch_size: int = option("images in a batch of calibration", low=1)
    device: Device = option("where to calibrate; auto: on CUDA if there is any")

    def check_typed(self, typed: set[str]) -> None:
        keys = sorted(key for key in typed if key in ("batch_size", "device") or key.startswith("data"))
        if keys and not self.average:
            raise ConfigError(f"{keys[0]}: is read with average=[...] alone, for calibration")
