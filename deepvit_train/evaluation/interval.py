"""How far a figure may be off because other images, or other seeds, could have been drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
# A bootstrap draws so many times, or fewer where that would draw more images than MOST_DRAWN in all.
RESAMPLES, FEWEST = 1000, 200
MOST_DRAWN = 100_000_000
BATCH = 1 << 22  # images drawn at a time, which bounds the memory


@dataclass(frozen=True)
class Estimate:
    """A figure with the ends of its 95 % interval. They are None where there is none."""

    value: float
    low: float | None
    high: float | None

    def plain(self) -> dict[str, float | None]:
        """Return the estimate as plain data for JSON, which has no NaN."""
        return {
            name: value if value is not None and isfinite(value) else None
            for name, value in asdict(self).items()
        }


def wilson(hits: int, total: int) -> Estimate:
    """Estimate a share from a count, with Wilson's interval (Wilson 1927)."""
    found = stats.binomtest(hits, total).proportion_ci(LEVEL, method="wilson")
    return Estimate(hits / total, float(found.low), float(found.high))


def bootstrap(
    statistic: Callable[[np.ndarray], Sequence[float]], images: int, seed: int = 0
) -> list[tuple[float, float] | None]:
    """Return a percentile interval for each figure that a function computes of a choice of images.

    It is None where every draw gave the same figure, as where no image is wrong: a bootstrap knows nothing of
    what it never draws, and an interval without width would claim to be certain.

    Args:
        statistic: takes numbers of images, some of them twice, and returns figures.
        images: how many images there are.
        seed: of the draws.
    """
    times = int(min(RESAMPLES, max(FEWEST, MOST_DRAWN // images)))
    if images < 2:
        return [None for _ in statistic(np.arange(images))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # every image was recognised
        found: Any = stats.bootstrap(
            (np.arange(images),),
            statistic,
            n_resamples=times,
            batch=max(1, BATCH // images),
            vectorized=False,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    pairs = zip(*map(np.atleast_1d, found.confidence_interval), strict=True)
    return [
        (float(low), float(high)) if isfinite(low) and isfinite(high) and low < high else None
        for low, high in pairs
    ]


def with_interval(value: float, interval: tuple[float, float] | None) -> Estimate:
    """Return an estimate from a figure and its interval, if it has one."""
    return Estimate(value, *(interval or (None, None)))


def paired_difference(gained: int, lost: int, total: int) -> Estimate:
    """Estimate the difference of two accuracies on the same images, second minus first.

    The interval is Wald's after half an image was added to each of the four counts (Bonett and Price 2012,
    "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data").

    Args:
        gained: images that the second alone tells right.
        lost: images that the first alone tells right.
        total: all images.
    """
    up, down = (gained + 1) / (total + 2), (lost + 1) / (total + 2)
    reach = float(stats.norm.ppf(0.5 + LEVEL / 2)) * sqrt((up + down - (up - down) ** 2) / (total + 2))
    return Estimate((gained - lost) / total, max(-1.0, up - down - reach), min(1.0, up - down + reach))


def mcnemar(gained: int, lost: int) -> float:
    """Return the p-value of McNemar's test, the exact one: of images that changed sides, half should gain."""
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


@dataclass(frozen=True)
class Shift:
    """A difference of two means over seeds with its interval, and the p-value of Welch's t-test.

    Where no run differs from another of its group there is no spread to judge by. Then the interval and the
    p-value are None, unless the means are equal too: then p is 1.
    """

    estimate: Estimate
    p: float | None


def seeds_difference(first: Sequence[float], second: Sequence[float]) -> Shift | None:
    """Compare the means of two groups of runs, second minus first; None for a group of one run."""
    if min(len(first), len(second)) < 2:
        return None
    value = float(np.mean(second) - np.mean(first))
    # Equal values have the variance 0; computed, it could be a rounding error that is no 0.
    squares = [float(np.var(each, ddof=1)) / len(each) if np.ptp(each) else 0.0 for each in (first, second)]
    total = sum(squares)
    if total == 0:
        equal = first[0] == second[0]
        return Shift(Estimate(0.0 if equal else value, None, None), 1.0 if equal else None)
    # The degrees of freedom are those of Welch and Satterthwaite. A group without spread adds nothing.
    freedom = total**2 / sum(
        square**2 / (len(each) - 1) for square, each in zip(squares, (first, second), strict=True)
    )
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * sqrt(total)
    p = 2 * float(stats.t.sf(abs(value) / sqrt(total), freedom))
    return Shift(Estimate(value, value - reach, value + reach), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method, in the same order."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda each: p_values[each])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
