"""Declare how attention collapse is measured: which maps, which vectors, and which threshold."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.console import amount
from deepvit_train.error import ConfigError


class Axis(Choice):
    column = "column"  # the weights of one key over all queries: Eq. 2 of arXiv 2103.11886
    row = "row"  # the weights of one query over all keys


class Metric(Choice):
    raw = "raw"  # the cosine of the maps as they are
    centred = "centred"  # the cosine after subtracting the mean of each row, which is 1/N for softmax maps


class Maps(Choice):
    pre_mix = "pre_mix"  # softmax maps
    post_norm = "post_norm"  # the maps that multiply V: mixed and normalised; in plain blocks softmax maps

    @property
    def label(self) -> str:
        """Return the name as it is printed: 'pre-mix'."""
        return self.value.replace("_", "-")


@dataclass(kw_only=True, slots=True)
class CollapseConfig(Section):
    maps: Maps = option("maps that are compared: pre_mix (softmax maps) or post_norm (mixed and normalised)")
    metric: Metric = option(
        "raw: cosine of the maps as they are; centred: without the uniform part that all softmax maps share"
    )
    axis: Axis = option(
        "vectors that are compared: column (a key over queries; the paper's Eq. 2) or row (a query over keys)"
    )
    threshold: float = option(
        "a block is similar if its mean similarity to the k blocks before it is above this", low=-1, high=1
    )
    k: int = option("number of blocks before it that a block is compared with", low=1, high=4096)
    images: int = option("validation images whose maps are compared", low=1)
    swap_rise: float = option(
        "a block is replaceable if the loss rises by less than this (nats) with the maps of the block before",
        low=0,
    )

    @classmethod
    def prefix(cls) -> str:
        return "collapse."

    @property
    def legend(self) -> str:
        """Return the definition of a similar block in one line, for figures and reports."""
        cosine = f"{self.metric} {self.axis} cosine > {self.threshold:g}"
        return f"{self.maps.label} maps, mean {cosine} to the {amount(self.k, 'block')} before"

    @property
    def swap_legend(self) -> str:
        """Return the definition of a replaceable block in one line."""
        return f"with the maps of the block before the loss rises by less than {self.swap_rise:g}"


@dataclass(kw_only=True, slots=True)
class WatchConfig(CollapseConfig):
    warn_above: float | None = option(
        "share of replaceable blocks (swap_rise) above which a warning is printed; null: never", low=0, high=1
    )
    stop_above: float | None = option(
        "share of replaceable blocks above which the run is saved and ended; null: never", low=0, high=1
    )
    alarm_from: float = option(
        "share of the run before which there is no alarm, because no maps matter yet", low=0, high=1
    )

    def check(self) -> None:
        if self.warn_above is not None and self.stop_above is not None and self.warn_above > self.stop_above:
            raise ConfigError(
                f"collapse.warn_above={self.warn_above:g} is above collapse.stop_above={self.stop_above:g}: "
                f"no warning would come before the stop; nearest: collapse.warn_above={self.stop_above:g}"
            )
        for name, bound in (("warn_above", self.warn_above), ("stop_above", self.stop_above)):
            if bound == 1.0:
                raise ConfigError(
                    f"collapse.{name}=1: no share is above 1; nearest: collapse.{name}=0.99, or null: never"
                )
