"""Compare the study's tests with scipy's, with closed forms, and with what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from deepvit_train.commands.study_statistics import (
    bootstrap,
    equivalence,
    interval,
    paired,
    sign_flip,
    spearman,
)


@pytest.mark.parametrize("seed", range(3))
def test_the_sign_flip_test_is_scipys_exact_one(seed: int) -> None:
    values = np.random.default_rng(seed).normal(0.5, 1, 8)
    expected = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(values.tolist()) == pytest.approx(expected.pvalue)


def test_the_smallest_p_of_eight_pairs() -> None:
    assert sign_flip([1.0] * 8) == 2 / 256
    assert sign_flip([1.0, -1.0]) == 1.0
    assert sign_flip([3.0]) == 1.0


def test_the_interval_is_that_of_a_t_test() -> None:
    values = [0.1, 0.4, -0.2, 0.9, 0.3]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval(values, 0.95) == pytest.approx((expected.low, expected.high))
    found = paired(values)
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, expected.low, expected.high))
    assert all(map(math.isnan, interval([1.0], 0.95)))


def test_equivalence_is_two_one_sided_tests() -> None:
    generator = np.random.default_rng(1)
    for shift in (0.0, 0.3, 0.45, 0.6):
        values = generator.normal(shift, 0.2, 8).tolist()
        above = stats.ttest_1samp(values, -0.5, alternative="greater").pvalue
        below = stats.ttest_1samp(values, 0.5, alternative="less").pvalue
        assert equivalence(values, 0.5)[0] == (max(above, below) < 0.05), shift


def test_correlation_of_ranks() -> None:
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_the_bootstrap_draws_whole_groups() -> None:
    """Members of a group are equal here, so the interval is that of the group means, not of the members."""
    means = np.random.default_rng(0).normal(0, 1, 20)
    low, high = bootstrap([[value] * 50 for value in means], lambda members: float(np.mean(members)))
    half = 1.96 * means.std() / math.sqrt(20)
    assert high - low == pytest.approx(2 * half, rel=0.1)
    assert low < means.mean() < high
