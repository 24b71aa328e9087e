"""The mean corruption error is the published one."""

from __future__ import annotations

import pytest

from deepvit_train.evaluation.robustness import ALEXNET_ERRORS, corruption_error, mean_corruption_error


def test_alexnet_has_an_error_of_a_hundred() -> None:
    accuracies = {name: [1 - error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(accuracies) == pytest.approx(100)
    # Only the sum over severities counts.
    uneven = {name: [1 - 2 * error + 0.5, 0.5, *[1 - error] * 3] for name, error in ALEXNET_ERRORS.items()}
    assert mean_corruption_error(uneven) == pytest.approx(100)


def test_a_resnet_50_has_the_published_error() -> None:
    # Table 1 of arXiv 1903.12261: the CE of a ResNet-50 by corruption, and its mCE of 76.7.
    published = [80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77]
    accuracies = {
        name: [1 - error * ce / 100] * 5
        for (name, error), ce in zip(ALEXNET_ERRORS.items(), published, strict=True)
    }
    assert corruption_error("glass_blur", accuracies["glass_blur"]) == pytest.approx(89)
    assert mean_corruption_error(accuracies) == pytest.approx(76.7, abs=0.5)


def test_what_is_not_whole_has_no_error() -> None:
    whole = {name: [0.5] * 5 for name in ALEXNET_ERRORS}
    assert mean_corruption_error({**whole, "fog": [0.5] * 4}) is None
    assert mean_corruption_error({name: each for name, each in whole.items() if name != "snow"}) is None
    assert corruption_error("spatter", [0.5] * 5) is None
    assert mean_corruption_error({**whole, "spatter": [0.0] * 5}) == mean_corruption_error(whole)
