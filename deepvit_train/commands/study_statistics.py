"""Test and describe paired differences, and correlations of a measure with accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

DRAWS = 1000  # of a bootstrap
LEVEL = 0.95


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, described.

    Attributes:
        mean, low, high: the mean and its 95 % interval by Student's t; low and high are NaN for one pair.
        p: of a two-sided sign-flip permutation test over all sign patterns; 1 for one pair.
    """

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p: float


def paired(differences: Sequence[float]) -> Paired:
    """Describe and test differences, of which there is one at least."""
    low, high = interval(differences, LEVEL)
    return Paired(tuple(differences), mean(differences), low, high, sign_flip(differences))


def interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Return the two-sided interval of a mean by Student's t, or NaN for a single value."""
    if len(values) < 2:
        return nan, nan
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def sign_flip(differences: Sequence[float]) -> float:
    """Return the share of all sign patterns whose mean is at least as far from 0 as the one seen."""
    if len(differences) < 2:
        return 1.0
    signs = np.array(np.meshgrid(*[[1, -1]] * len(differences))).reshape(len(differences), -1)
    means = np.abs(np.asarray(differences) @ signs)
    return float((means >= abs(sum(differences)) - 1e-12).mean())


def equivalence(differences: Sequence[float], margin: float) -> tuple[bool, float, float]:
    """Return whether a mean lies within +-margin by two one-sided t tests, and its 90 % interval."""
    low, high = interval(differences, 0.9)
    return -margin < low and high < margin, low, high


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN where one of them is constant or there are fewer than 3."""
    if len(x) < 3 or len({*x}) < 2 or len({*y}) < 2:
        return nan
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def bootstrap(
    groups: Sequence[Sequence[Any]], statistic: Callable[[list[Any]], float], seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic of all members, drawing whole groups."""
    generator, found = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        drawn = generator.integers(len(groups), size=len(groups))
        found.append(statistic([member for place in drawn for member in groups[place]]))
    known = [value for value in found if value == value]
    if not known:
        return nan, nan
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
