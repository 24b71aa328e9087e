"""How attention collapse is measured: which maps, which vectors, which mark. Printed beside every figure."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.error import ConfigError


class Axis(Choice):
    column = "column"  # a key's weights over all queries: Eq. 2 of arXiv 2103.11886
    row = "row"  # a query's weights over all keys


class Metric(Choice):
    raw = "raw"  # cosine of the maps as they are
    centred = "centred"  # cosine after the mean of each row (1/N of a softmax map) is taken away


class Maps(Choice):
    pre_mix = "pre_mix"  # softmax maps
    post_norm = "post_norm"  # the maps that read the values: mixed and normalised; plain blocks: softmax

    @property
    def label(self) -> str:
        """As it is printed: 'pre-mix'."""
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

    @classmethod
    def prefix(cls) -> str:
        return "collapse."

    @property
    def legend(self) -> str:
        """The definition of a similar block in one line, for figures."""
        cosine = f"{self.metric} {self.axis} cosine > {self.threshold:g}"
        return f"{self.maps.label} maps, {cosine} to the {self.k} before"


@dataclass(kw_only=True, slots=True)
class WatchConfig(CollapseConfig):
    warn_above: float | None = option(
        "share of similar blocks above which a warning is printed; null: never", low=0, high=1
    )
    stop_above: float | None = option(
        "share of similar blocks above which the run is saved and ended; null: never", low=0, high=1
    )

    def check(self) -> None:
        if self.warn_above is not None and self.stop_above is not None and self.warn_above > self.stop_above:
            raise ConfigError(
                f"collapse.warn_above={self.warn_above:g} is above collapse.stop_above={self.stop_above:g}: "
                f"no warning would come before the stop; nearest: collapse.warn_above={self.stop_above:g}"
            )
