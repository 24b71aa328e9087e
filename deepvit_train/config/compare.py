"""What `deepvit-compare` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Section, option
from deepvit_train.config.recipe import Device
from deepvit_train.error import ConfigError, OutputError


@dataclass(kw_only=True, slots=True)
class CompareConfig(Section):
    """Tell which of several models is better on the same images, and whether that is within noise."""

    runs: list[str] = option(
        "two or more of: runs, checkpoints, folders that deepvit-eval wrote a report into; the first is what "
        "the others are compared with; paths may be typed alone"
    )
    out: str | None = option(
        "folder that comparison.json, report.html and figures are written to; null: "
        "comparison/OTHERS-DIGEST/ in the first run",
        path=OutputError,
    )
    batch_size: int = option("images in a batch, where a run must be evaluated first", low=1)
    device: Device = option("where to evaluate; auto: on CUDA if there is any")
    threads: int | None = option("CPU threads; null: as torch chooses", low=1, high=4096)

    def check(self) -> None:
        if len(self.runs) < 2:
            raise ConfigError("runs: give two or more, as in deepvit-compare runs/A runs/B")
        if twice := [run for place, run in enumerate(self.runs) if run in self.runs[:place]]:
            raise ConfigError(f"runs: {twice[0]} is given twice")
