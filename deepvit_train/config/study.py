"""The study of the paper: which models are trained, on what, and how they are measured."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.config.option import Section, option
from deepvit_train.error import ConfigError


@dataclass(kw_only=True, slots=True)
class GridConfig(Section):
    """The cells of a study: depths x attentions at one width, and a series over widths at one depth."""

    depths: list[int] = option("numbers of blocks", low=2, high=4096)
    attentions: list[str] = option("attentions at every depth, by their names in attn=")
    dim: int = option("width at every depth", low=1, high=65536)
    widths: list[int] = option("widths of the series over widths; none: no series", low=1, high=65536)
    width_depth: int = option("blocks in the series over widths", low=2, high=4096)
    width_attentions: list[str] = option("attentions in the series over widths")
    seeds: list[int] = option("seeds of every cell; all cells of the first come first", low=0, high=2**31 - 1)

    @classmethod
    def prefix(cls) -> str:
        return "study."

    def check(self) -> None:
        for name in ("depths", "attentions", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"study.{name}=[]: needs at least one value")


@dataclass(kw_only=True, slots=True)
class StudyConfig(Section):
    """Everything that `deepvit-study` can be told."""

    study: GridConfig
    train: list[str] = option("deepvit-train's overrides in every cell, besides depth, attn, dim and seed")
    root: str = option("ImageFolder with train/ and val/ that every cell reads")
    train_images: int | None = option("training images, evenly over classes; null: all", low=1)
    val_images: int | None = option("validation images, evenly over classes; null: all", low=1)
    out: str = option("folder of the study; the same folder again continues it")
    collapse: CollapseConfig
    batch_size: int = option("images whose maps are held at a time", low=1)
    limit_cells: int | None = option("cells to train now; 0: only table and figures; null: all", low=0)
    threads: int | None = option("CPU threads of each cell; null: torch's choice", low=1, high=4096)
