"""Declare the keys of `deepvit-study`: which models are trained, on what data, and how they are measured."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.config.option import Section, option
from deepvit_train.error import ConfigError, DataError, OutputError


@dataclass(kw_only=True, slots=True)
class GridConfig(Section):
    """The cells of a study: depths x attentions at one width, and a series over widths at one depth."""

    depths: list[int] = option("numbers of blocks", low=2, high=4096)
    attentions: list[str] = option("names in attn= that are trained at every depth")
    dim: int = option("width of the models at every depth", low=1, high=65536)
    widths: list[int] = option(
        "widths of a second series, at one depth; []: no second series", low=1, high=65536
    )
    width_depth: int = option("number of blocks in the second series", low=2, high=4096)
    width_attentions: list[str] = option("names in attn= that are trained in the second series")
    seeds: list[int] = option(
        "random seeds that every cell is trained with; all cells of the first seed come first",
        low=0,
        high=2**31 - 1,
    )

    @classmethod
    def prefix(cls) -> str:
        return "study."

    def check(self) -> None:
        for name in ("depths", "attentions", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"study.{name}=[]: needs at least one value")


@dataclass(kw_only=True, slots=True)
class StudyConfig(Section):
    """Train a grid of depths, attentions and seeds, and compare accuracy and attention maps."""

    study: GridConfig
    train: list[str] = option("overrides of deepvit-train in every cell, besides depth, attn, dim and seed")
    root: str = option("folder with train/ and val/ that every cell reads", path=DataError)
    train_images: int | None = option("training images to use, as many of each class; null: all", low=1)
    val_images: int | None = option("validation images to use, as many of each class; null: all", low=1)
    out: str = option("folder that the study is written to; a study in it is continued", path=OutputError)
    collapse: CollapseConfig
    batch_size: int = option("images whose attention maps are in memory at a time", low=1)
    limit_cells: int | None = option(
        "cells to train now; 0: none, write table and figures only; null: all that are left", low=0
    )
    threads: int | None = option("CPU threads of each cell; null: as torch chooses", low=1, high=4096)
