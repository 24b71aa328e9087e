"""The figures of an evaluation are those of scikit-learn and torchmetrics, and of a loop."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn import metrics

from deepvit_train.evaluation.interval import Estimate
from deepvit_train.evaluation.metric import (
    BINS,
    by_class,
    expected_error,
    fit_temperature,
    mean_recall_and_f1,
    most_confused,
    overall,
    reliability,
    surest_mistakes,
    worst_images,
)
from deepvit_train.evaluation.prediction import NO_ANSWER
from tests.evaluation.synthetic import draw_predictions, predictions_of

SEEN = draw_predictions(600, 7)


def test_figures_by_class_are_those_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import (
        multiclass_f1_score,
        multiclass_precision,
        multiclass_recall,
    )

    told, targets = torch.tensor(SEEN.predicted), torch.tensor(SEEN.targets)
    found = by_class(SEEN, range(7))
    for name, oracle in (
        ("precision", multiclass_precision),
        ("recall", multiclass_recall),
        ("f1", multiclass_f1_score),
    ):
        expected = oracle(told, targets, num_classes=7, average=None)
        assert [getattr(each, name) for each in found] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [each.support for each in found] == np.bincount(SEEN.targets).tolist()


def test_a_class_without_images_is_unknown() -> None:
    seen = predictions_of(np.eye(4, dtype=np.float32)[[0, 1, 1]] * 9, np.array([0, 1, 0]))
    found = by_class(seen, range(4))
    assert (found[0].recall, found[0].precision, found[0].support) == (0.5, 1.0, 2)
    assert (found[2].recall, found[2].precision, found[2].f1, found[2].support) == (None, None, None, 0)


def test_overall_figures_are_those_of_scikit_learn() -> None:
    found = overall(SEEN, 7)
    assert found["accuracy"].value == metrics.accuracy_score(SEEN.targets, SEEN.predicted)
    balanced = metrics.balanced_accuracy_score(SEEN.targets, SEEN.predicted)
    assert found["mean_class_accuracy"].value == pytest.approx(balanced)
    macro = metrics.f1_score(SEEN.targets, SEEN.predicted, average="macro")
    assert found["macro_f1"].value == pytest.approx(macro)
    assert found["loss"].value == pytest.approx(metrics.log_loss(SEEN.targets, softmax(SEEN.logits, axis=1)))
    for estimate in found.values():
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high


def test_a_perfect_result_claims_no_certainty() -> None:
    seen = predictions_of(np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 10] * 3, np.array([0, 1, 2, 3] * 10))
    found = overall(seen, 4)
    for name in ("mean_class_accuracy", "macro_f1"):
        assert found[name] == Estimate(1.0, None, None)
    # Wilson's lower end of 40 hits of 40: n / (n + z^2).
    assert found["accuracy"].low == pytest.approx(40 / (40 + 1.959964**2), rel=1e-5)
    assert fit_temperature(seen) is None  # every lower one would be better


@pytest.mark.parametrize("classes", [3, 40, 1000])
def test_the_fast_means_are_those_of_the_classes(classes: int) -> None:
    seen = draw_predictions(300, classes)
    figures = by_class(seen, range(classes))
    recall, f1 = mean_recall_and_f1(seen.targets, seen.predicted, classes)
    assert recall == pytest.approx(np.mean([each.recall for each in figures if each.recall is not None]))
    assert f1 == pytest.approx(np.mean([each.f1 for each in figures if each.f1 is not None]))


def test_the_calibration_error_is_that_of_a_loop_and_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    total = 0.0
    for place in range(BINS):
        inside = (SEEN.probability > place / BINS) & (SEEN.probability <= (place + 1) / BINS)
        if inside.any():
            total += abs(SEEN.probability[inside].sum() - SEEN.right[inside].sum())
    found = expected_error(SEEN.probability, SEEN.right)
    assert found == pytest.approx(total / len(SEEN))
    shares = torch.tensor(softmax(SEEN.logits.astype(np.float64), axis=1))
    oracle = multiclass_calibration_error(shares, torch.tensor(SEEN.targets), num_classes=7, n_bins=BINS)
    assert found == pytest.approx(float(oracle), abs=1e-6)
    curve = reliability(SEEN.probability, SEEN.right)
    parts = zip(curve.probability, curve.accuracy, curve.images, strict=True)
    assert sum(abs(p - accuracy) * images for p, accuracy, images in parts) / len(SEEN) == pytest.approx(
        found
    )


def test_the_temperature_is_found_again_and_is_scikit_learns() -> None:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    from deepvit_train.determinism import derive_seed, permutation

    class Logits(ClassifierMixin, BaseEstimator):
        classes_ = np.arange(5)

        def __sklearn_is_fitted__(self) -> bool:
            return True

        def decision_function(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(axis=1)

        def fit(self, x: np.ndarray, y: np.ndarray) -> Logits:
            return self

    rng = np.random.default_rng(5)
    true = rng.normal(size=(6000, 5)) * 2
    targets = np.array([rng.choice(5, p=row) for row in softmax(true, axis=1)])
    seen = predictions_of((3.0 * true).astype(np.float32), targets)
    found = fit_temperature(seen)
    assert found is not None
    assert found.value == pytest.approx(3.0, rel=0.1)
    assert (found.fitted_on, found.judged_on) == (3000, 3000)
    assert found.loss[1] < found.loss[0]
    assert found.ece[1] < found.ece[0] / 3
    half = permutation(6000, derive_seed("temperature"))[:3000]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = CalibratedClassifierCV(FrozenEstimator(Logits()), method="temperature", ensemble=False)
        oracle.fit(seen.logits[half].astype(np.float64), targets[half])
    beta = oracle.calibrated_classifiers_[0].calibrators[0].beta_
    assert found.value == pytest.approx(1 / beta, rel=0.01)


def test_what_is_not_finite_is_wrong_and_has_no_probability() -> None:
    logits = np.tile(np.float32([2.0, 0.0, 1.0]), (8, 1))
    logits[:3] = np.nan
    with np.errstate(all="ignore"):
        seen = predictions_of(logits, np.array([0, 1, 2, 0, 1, 2, 0, 0]))
    assert (seen.predicted == NO_ANSWER).sum() == 3
    found = overall(seen, 3)
    assert found["accuracy"].value == 3 / 8
    assert np.isnan(found["loss"].value)
    assert found["ece"].value == pytest.approx(expected_error(seen.probability[3:], seen.right[3:]))
    temperature = fit_temperature(seen)
    assert temperature is not None
    assert temperature.fitted_on + temperature.judged_on == 5
    assert all(pair.told == 0 for pair in most_confused(seen, 3, 5))
    assert set(surest_mistakes(seen, 5)) == {4, 5}


def test_pairs_and_images_are_the_most_frequent_the_surest_and_the_worst() -> None:
    matrix = metrics.confusion_matrix(SEEN.targets, SEEN.predicted, labels=range(7))
    np.fill_diagonal(matrix, 0)
    pairs = most_confused(SEEN, 7, 100)
    assert sum(pair.images for pair in pairs) == matrix.sum()
    assert pairs[0].images == matrix.max()
    for pair in pairs:
        assert matrix[pair.true, pair.told] == pair.images
        assert pair.share == pair.images / (SEEN.targets == pair.true).sum()
    assert worst_images(SEEN, 1) == [int(SEEN.loss.argmax())]
    surest = surest_mistakes(SEEN, 3)
    assert not SEEN.right[surest].any()
    assert SEEN.probability[surest[0]] == SEEN.probability[~SEEN.right].max()
