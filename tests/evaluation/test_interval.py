"""Intervals hold what they promise, and McNemar's test is scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deepvit_train.evaluation.interval import (
    bootstrap,
    holm,
    mcnemar,
    paired_difference,
    seeds_difference,
    wilson,
)

DRAWS = 2000


@pytest.mark.parametrize(("share", "images"), [(0.8, 364), (0.97, 1000), (0.5, 60)])
def test_wilsons_interval_holds_the_true_share_in_95_of_100_draws(share: float, images: int) -> None:
    hits = np.random.default_rng(0).binomial(images, share, DRAWS)
    ends = {count: wilson(int(count), images) for count in np.unique(hits)}
    held = np.mean([ends[count].low <= share <= ends[count].high for count in hits])
    assert 0.93 <= held <= 0.97


@pytest.mark.parametrize(
    ("gain", "loss", "images"), [(0.05, 0.05, 364), (0.10, 0.04, 364), (0.02, 0.01, 2000), (0.2, 0.1, 100)]
)
def test_the_interval_of_a_paired_difference_holds_the_true_one(
    gain: float, loss: float, images: int
) -> None:
    rest = 1 - gain - loss
    draws = np.random.default_rng(1).multinomial(images, [gain, loss, rest], DRAWS)
    found = [paired_difference(int(gained), int(lost), images) for gained, lost, _ in draws]
    assert 0.93 <= np.mean([each.low <= gain - loss <= each.high for each in found]) <= 0.97
    assert np.mean([each.value for each in found]) == pytest.approx(gain - loss, abs=0.002)


def test_a_bootstrap_holds_the_true_mean() -> None:
    rng, held = np.random.default_rng(2), 0
    for draw in range(100):  # each a thousand resamples
        losses = rng.exponential(1.0, 200)
        (ends,) = bootstrap(lambda chosen, losses=losses: [float(losses[chosen].mean())], 200, seed=draw)
        assert ends is not None
        held += ends[0] <= 1.0 <= ends[1]
    assert 0.88 <= held / 100 <= 0.99


def test_a_bootstrap_is_the_same_every_time_and_knows_when_it_knows_nothing() -> None:
    values = np.random.default_rng(3).normal(size=50)

    def figures(chosen: np.ndarray) -> list[float]:
        return [float(values[chosen].mean()), float("nan"), 1.0]

    first, second = bootstrap(figures, 50), bootstrap(figures, 50)
    assert first == second
    assert first[1] is None
    assert first[2] is None  # no width, so no interval
    assert bootstrap(figures, 1) == [None, None, None]


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 1), (0, 6), (12, 11), (40, 15), (900, 800)])
def test_mcnemar_is_the_exact_test(gained: int, lost: int) -> None:
    few = stats.binom(gained + lost, 0.5)
    expected = min(1.0, 2 * few.cdf(min(gained, lost)))
    assert mcnemar(gained, lost) == pytest.approx(expected)
    if gained + lost > 1000:  # there the usual approximation says the same
        corrected = (abs(gained - lost) - 1) ** 2 / (gained + lost)
        assert mcnemar(gained, lost) == pytest.approx(stats.chi2.sf(corrected, 1), rel=0.02)


def test_mcnemar_errs_in_at_most_five_of_a_hundred() -> None:
    gained = np.random.default_rng(4).binomial(30, 0.5, DRAWS)
    assert np.mean([mcnemar(int(count), int(30 - count)) < 0.05 for count in gained]) <= 0.06


def test_seeds_are_compared_as_welch_compares_them() -> None:
    first, second = [0.80, 0.82, 0.81], [0.84, 0.86, 0.83, 0.85]
    found = seeds_difference(first, second)
    assert found is not None
    assert found.estimate.value == pytest.approx(np.mean(second) - np.mean(first))
    assert found.p == pytest.approx(stats.ttest_ind(first, second, equal_var=False).pvalue)
    ends = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((ends.low, ends.high))
    assert seeds_difference([0.8], second) is None
    same = seeds_difference([0.8, 0.8], [0.8, 0.8])
    assert same is not None
    assert same.p == 1.0


# 349/364 has no exact binary form: its computed variance would be a rounding error, and scipy warns of it.
@pytest.mark.parametrize("tie", [[349 / 364] * 2, [0.1] * 3])
def test_a_group_without_spread_adds_none_to_welchs_test(tie: list[float]) -> None:
    spread = [0.931, 0.959]
    found = seeds_difference(tie, spread)
    # By hand: only the other group has a variance, so this is Student's t with its one degree of freedom.
    value = np.mean(spread) - tie[0]
    t = value / (np.std(spread, ddof=1) / np.sqrt(2))
    assert found is not None
    assert found.p == pytest.approx(2 * (0.5 - np.arctan(abs(t)) / np.pi))  # Cauchy's distribution
    assert found.estimate.low is not None
    assert found.estimate.high is not None
    assert found.estimate.high - value == pytest.approx(value - found.estimate.low)
    assert found.estimate.high - value == pytest.approx(np.tan(np.pi * 0.475) * abs(value / t))


def test_two_groups_without_spread_differ_without_a_test() -> None:
    found = seeds_difference([0.5, 0.5], [0.75, 0.75, 0.75])
    assert found is not None
    assert (found.estimate.value, found.estimate.low, found.estimate.high, found.p) == (
        0.25,
        None,
        None,
        None,
    )


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
