"""Declare the keys of `loss`: what is minimised, and how much each class counts in it."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.error import ConfigError, DataError

# What loss.class_weight can say; anything else is a file.
UNWEIGHTED, BALANCED, EFFECTIVE = "none", "balanced", "effective"
CLASS_WEIGHTS = (UNWEIGHTED, BALANCED, EFFECTIVE)


class LossName(Choice):
    cross_entropy = "cross_entropy"
    bce = "bce"
    focal = "focal"


class CosineAxis(Choice):
    heads = "heads"  # the vector at each (query, key) runs over heads: the authors' code
    queries = "queries"  # the vector of each head and key runs over queries: the paper's Eq. 2


# The losses that read a key. Those that are not here are read by all.
READ_BY = {"focal_gamma": LossName.focal, "target_threshold": LossName.bce}


@dataclass(kw_only=True, slots=True)
class LossConfig(Section):
    name: LossName = option("what is minimised")
    label_smoothing: float = option("share of the target that is spread over all classes", low=0, below=1)
    class_weight: str = option(
        "how much an image counts by its class: none; balanced: by one over the images of the class; "
        "effective: by one over its effective number; or a file of lines 'class: weight'",
        path=DataError,
    )
    effective_beta: float = option(
        "of loss.class_weight=effective: n images count as (1 - beta^n) / (1 - beta)", low=0, below=1
    )
    focal_gamma: float = option("of loss=focal: the power of the probability that is missed", low=0, high=100)
    target_threshold: float | None = option(
        "of loss=bce: soft targets above it become 1, and others 0; null: they stay soft", low=0, below=1
    )
    cosine_weight: float = option(
        "weight in the loss of the mean cosine between attention maps of consecutive blocks; 0: off",
        low=0,
        high=1000,
    )
    cosine_axis: CosineAxis = option("axis of the vectors that are compared: over heads, or over queries")
    cosine_pairs: int | None = option(
        "number of first pairs of consecutive blocks that are compared; null: all", low=1
    )

    @classmethod
    def prefix(cls) -> str:
        return "loss."

    def check(self) -> None:
        if not self.class_weight.strip():
            raise ConfigError(
                f"loss.class_weight={self.class_weight!r}: choices: {', '.join(CLASS_WEIGHTS)}, or a file"
            )

    def check_typed(self, typed: set[str]) -> None:
        for key, reader in READ_BY.items():
            if f"loss.{key}" in typed and self.name != reader:
                raise ConfigError(f"loss.{key}: loss={self.name} does not read it; nearest: loss={reader}")
        if "loss.effective_beta" in typed and self.class_weight != EFFECTIVE:
            raise ConfigError(
                f"loss.effective_beta: loss.class_weight={self.class_weight} does not read it; nearest: "
                "loss.class_weight=effective"
            )
