"""Which evaluation of a run is the best one."""

from __future__ import annotations

import math

import pytest

from deepvit_train.training.validation import _is_best

NAN = math.nan


@pytest.mark.parametrize(
    ("found", "best", "expected"),
    [
        ((1.0, 0.1142), (1.0, 0.2838), True),  # the figures that a photographer saw
        ((1.0, 0.2838), (1.0, 0.1142), False),
        ((1.0, 0.1142), (1.0, 0.1142), False),  # the earlier one stays
        ((0.9, 0.1), (1.0, 0.5), False),  # the loss decides among equal ones alone
        ((1.0, 0.5), (0.9, 0.1), True),
        ((1.0, NAN), (1.0, 0.5), False),
        ((1.0, 0.5), (1.0, NAN), True),
        ((1.0, NAN), (1.0, NAN), False),
    ],
)
@pytest.mark.parametrize("figure", ["top1", "mean_class"])
@pytest.mark.parametrize("weights", ["val", "val_ema"])
def test_of_equal_figures_the_one_with_the_lower_loss_is_the_best(
    weights: str, figure: str, found: tuple[float, float], best: tuple[float, float], expected: bool
) -> None:
    def metrics(values: tuple[float, float]) -> dict[str, float]:
        # The loss of the live weights says the opposite where the averaged ones decide.
        other = {"val/loss": -values[1]} if weights == "val_ema" else {}
        return other | {f"{weights}/{figure}": values[0], f"{weights}/loss": values[1]}

    assert _is_best(metrics(found), metrics(best), f"{weights}/{figure}") == expected


@pytest.mark.parametrize(
    ("found", "best", "expected"), [(0.1, 0.2, True), (0.2, 0.1, False), (0.1, 0.1, False), (NAN, NAN, False)]
)
def test_of_equal_losses_the_earlier_one_stays_the_best(found: float, best: float, expected: bool) -> None:
    evaluation, before = ({"val/top1": top1, "val/loss": loss} for top1, loss in ((0.9, found), (0.1, best)))
    assert _is_best(evaluation, before, "val/loss") == expected
