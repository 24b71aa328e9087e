"""What `deepvit-data check` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.data import AugmentConfig, DataConfig
from deepvit_train.config.model import AttentionConfig, ModelConfig, check_architecture
from deepvit_train.config.option import Section, option
from deepvit_train.config.recipe import Device, Precision
from deepvit_train.error import ConfigError, DataError


@dataclass(kw_only=True, slots=True)
class DataCheckConfig(Section):
    """Read every image of a data set, report what is wrong, and time the parts of a training step."""

    root: str = option("folder of the data set, with train/ and val/ in it", path=DataError)
    data: DataConfig
    model: ModelConfig
    attn: AttentionConfig
    augment: AugmentConfig
    timing: bool = option("whether to measure where a training step spends its time")
    batch_size: int | None = option(
        "images in a batch of the timed step; null: 64 on CUDA, 4 on the CPU", low=1, high=65536
    )
    precision: Precision = option("number format of the timed step's matrix products")
    device: Device = option("where the timed step runs; auto: on CUDA if there is any")
    threads: int | None = option("CPU threads; null: as torch chooses", low=1, high=4096)

    def check(self) -> None:
        check_architecture(self.model, self.attn)
        if self.data.root != self.root:
            raise ConfigError(f"data.root={self.data.root}: another folder than root={self.root}")
