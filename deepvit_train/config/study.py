"""Declare the keys of `deepvit-study`: which models are trained, on what data, and how they are measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.config.listing import parts
from deepvit_train.config.option import Section, option
from deepvit_train.error import ConfigError, DataError, OutputError

ARMS = "arms: names in attn=, or NAME: OVERRIDES of deepvit-train, such as scaled: model.layer_scale=0.1"


@dataclass(frozen=True)
class Arm:
    """One way to train, which a study compares with others: its name, and overrides of deepvit-train."""

    name: str
    overrides: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class GridConfig(Section):
    """The cells of a study: depths x arms at one width, and a series over widths at one depth."""

    depths: list[int] = option("numbers of blocks", low=2, high=4096)
    attentions: list[str] = option(f"what is trained at every depth; {ARMS}")
    dim: int = option("width of the models at every depth", low=1, high=65536)
    widths: list[int] = option(
        "widths of a second series, at one depth; []: no second series", low=1, high=65536
    )
    width_depth: int = option("number of blocks in the second series", low=2, high=4096)
    width_attentions: list[str] = option(f"what is trained in the second series; {ARMS}")
    seeds: list[int] = option(
        "random seeds that every cell is trained with; all cells of the first seed come first",
        low=0,
        high=2**31 - 1,
    )
    rates: list[float] = option(
        "learning rates to choose from for each arm and depth, by a search on the seeds search_seeds; []: no "
        "search, the rate of train=",
        above=0,
        high=1e6,
    )
    search_seeds: list[int] = option("random seeds of the search", low=0, high=2**31 - 1)

    @classmethod
    def prefix(cls) -> str:
        return "study."

    def check(self) -> None:
        for name in ("depths", "attentions", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"study.{name}=[]: needs at least one value")
        if self.rates and not self.search_seeds:
            raise ConfigError("study.search_seeds=[]: a search of study.rates needs at least one seed")
        if self.rates and self.widths:
            raise ConfigError("study.rates are searched at one width; nearest: study.widths=[]")
        if self.rates and (both := sorted({*self.seeds} & {*self.search_seeds})):
            raise ConfigError(f"study.search_seeds: {both[0]} is one of study.seeds, which must be others")
        for entries in (self.attentions, self.width_attentions):
            arms_of(entries)


def arms_of(entries: list[str]) -> list[Arm]:
    """Return the arms that entries name: 'self' is attn=self, and 'NAME: OVERRIDES' says it in full.

    Raises ConfigError for an entry that can't be read, and for two of one name.
    """
    arms = []
    for entry in entries:
        name, colon, typed = (each.strip() for each in entry.partition(":"))
        if not re.fullmatch(r"\w[\w.-]*", name, flags=re.ASCII):
            raise ConfigError(f"{entry!r}: an arm is a name in attn=, or NAME: KEY=VALUE KEY=VALUE")
        try:
            overrides = parts(typed, " ") if colon else [f"attn={name}"]
        except ValueError as error:
            raise ConfigError(f"{entry!r}: {error}") from None
        if name in (arm.name for arm in arms):
            raise ConfigError(f"{entry!r}: another arm has the name {name}")
        arms.append(Arm(name, tuple(overrides)))
    return arms


@dataclass(kw_only=True, slots=True)
class StudyConfig(Section):
    """Train a grid of depths, arms and seeds, and compare accuracy and attention maps."""

    study: GridConfig
    train: list[str] = option(
        "overrides of deepvit-train in every cell, besides those of its arm and its place"
    )
    root: str = option("folder with train/ and val/ that every cell reads", path=DataError)
    train_images: int | None = option("training images to use, as many of each class; null: all", low=1)
    val_images: int | None = option("validation images to use, as many of each class; null: all", low=1)
    search_images: int | None = option(
        "training images that are kept from training, to evaluate the search of study.rates on", low=1
    )
    out: str = option("folder that the study is written to; a study in it is continued", path=OutputError)
    collapse: CollapseConfig
    batch_size: int = option("images whose attention maps are in memory at a time", low=1)
    limit_cells: int | None = option(
        "cells to train now; 0: none, write table and figures only; null: all that are left", low=0
    )
    cells_at_a_time: int = option("cells to train side by side", low=1, high=1024)
    threads: int | None = option("CPU threads of each cell; null: as torch chooses", low=1, high=4096)

    def check(self) -> None:
        if self.cells_at_a_time > 1 and self.threads is None:
            raise ConfigError(
                f"cells_at_a_time={self.cells_at_a_time}: needs threads=, so that cells share the cores; "
                "nearest: threads=1"
            )
        if self.study.rates and (self.search_images is None or self.train_images is None):
            raise ConfigError(
                "study.rates: a search needs images that no cell trains on; give search_images= and "
                "train_images="
            )
