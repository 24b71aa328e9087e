"""What `deepvit-convert` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.foreign import ForeignKeys, Weights
from deepvit_train.config.option import option
from deepvit_train.error import CheckpointError, OutputError


@dataclass(kw_only=True, slots=True)
class ConvertConfig(ForeignKeys):
    """Turn weights of any known layout into one file that says itself what its model is."""

    source: str = option(
        "weights file of any known layout, or a checkpoint or run of this project; or hf:ORG/NAME[@REVISION]",
        path=CheckpointError,
    )
    out: str = option("new folder that model.safetensors is written into", path=OutputError)
    weights: Weights = option(
        "which weights to take; ema: the averaged ones; auto: ema if there are any, else live"
    )
