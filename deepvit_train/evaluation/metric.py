"""What the predictions of an evaluation are worth: by class, over all, and how far to trust probabilities.

Shapes: C classes, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_fscore_support

from deepvit_train.determinism import derive_seed, permutation
from deepvit_train.evaluation.interval import Estimate, bootstrap, wilson, with_interval
from deepvit_train.evaluation.prediction import Predictions

BINS = 15  # of probability, as in Guo et al., arXiv 1706.04599
TEMPERATURES = (0.05, 20.0)  # between these the temperature is looked for


@dataclass(frozen=True)
class ClassFigures:
    """What is known of one class. A share of no images is None.

    Args:
        precision: share of right ones among the images that were told to be of this class.
        recall: share of right ones among its images.
        f1: harmonic mean of the two.
        support: how many images it has.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int


def by_class(predictions: Predictions, classes: Sequence[int]) -> list[ClassFigures]:
    """Return the figures of the classes with these numbers, as scikit-learn computes them."""
    unknown: Any = np.nan
    found = precision_recall_fscore_support(
        predictions.targets, predictions.predicted, labels=list(classes), zero_division=unknown
    )
    rows = zip(*(np.asarray(each).tolist() for each in found), strict=True)
    return [ClassFigures(_known(p), _known(r), _known(f1), seen) for p, r, f1, seen in rows]


def _known(value: float) -> float | None:
    return value if isfinite(value) else None


def overall(predictions: Predictions, classes: int) -> dict[str, Estimate]:
    """Return accuracy, mean-class accuracy, macro F1, loss and calibration error with 95 % intervals.

    Accuracy has Wilson's interval, the others that of a bootstrap over images.

    Args:
        classes: how many outputs the model has.
    """

    def figures(chosen: np.ndarray) -> list[float]:
        targets, told = predictions.targets[chosen], predictions.predicted[chosen]
        recall, f1 = mean_recall_and_f1(targets, told, classes)
        return [recall, f1, float(predictions.loss[chosen].mean()), calibration_error(predictions, chosen)]

    names = ("mean_class_accuracy", "macro_f1", "loss", "ece")
    values, ends = figures(np.arange(len(predictions))), bootstrap(figures, len(predictions))
    rest = zip(names, values, ends, strict=True)
    found = {name: with_interval(value, interval) for name, value, interval in rest}
    return {"accuracy": wilson(int(predictions.right.sum()), len(predictions)), **found}


def mean_recall_and_f1(targets: np.ndarray, told: np.ndarray, classes: int) -> tuple[float, float]:
    """Return the means over classes of recall and of F1, as `by_class` has them, in a hundredth of the time.

    The mean recall is of the classes with an image. The mean F1 is of those and of the classes that were told
    without having one. A bootstrap needs both a thousand times.
    """
    support = np.bincount(targets, minlength=classes)
    hits = np.bincount(targets[told == targets], minlength=classes)
    tellings = np.bincount(told[told >= 0], minlength=classes)
    seen, known = support > 0, support + tellings > 0
    recall = (hits[seen] / support[seen]).mean()
    return float(recall), float((2 * hits[known] / (support + tellings)[known]).mean())


def calibration_error(predictions: Predictions, chosen: np.ndarray) -> float:
    """Return the expected calibration error of a choice of images: the mean over bins of the distance between
    probability and accuracy, each bin counted by its images. Images without an answer are left out.
    """
    chosen = chosen[predictions.answered[chosen]]
    return expected_error(predictions.probability[chosen], predictions.right[chosen])


def expected_error(probability: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error of probabilities, (N,), that were right or not, (N,) bool."""
    if not len(probability):
        return float("nan")
    gaps = np.bincount(bins_of(probability), weights=probability - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(probability))


def bins_of(probability: np.ndarray) -> np.ndarray:
    """Return the bin of each probability; a bin holds its upper end, as scikit-learn has it."""
    return np.searchsorted(np.linspace(0.0, 1.0, BINS + 1)[1:-1], probability)


@dataclass(frozen=True)
class Reliability:
    """For each bin that is not empty: mean probability, accuracy, and the number of images."""

    probability: list[float]
    accuracy: list[float]
    images: list[int]


def reliability(probability: np.ndarray, right: np.ndarray) -> Reliability:
    """Return the reliability curve of probabilities, (N,), that were right or not, (N,) bool."""
    if not len(probability):
        return Reliability([], [], [])
    clipped = np.clip(probability, 0.0, 1.0)  # a softmax in single precision may round to more than 1
    accuracy, mean = calibration_curve(right.astype(int), clipped, n_bins=BINS, pos_label=1)
    counts = np.bincount(bins_of(clipped), minlength=BINS)
    return Reliability(mean.tolist(), accuracy.tolist(), counts[counts > 0].tolist())


@dataclass(frozen=True)
class Temperature:
    """A temperature that was fitted on one half of the images, and what it does to the other half.

    Args:
        value: what the logits are divided by. At an end of TEMPERATURES nothing better lies between.
        fitted_on, judged_on: numbers of images.
        loss, ece: of the other half, before and after.
        after: its reliability curve after.
    """

    value: float
    fitted_on: int
    judged_on: int
    loss: tuple[float, float]
    ece: tuple[float, float]
    after: Reliability


def fit_temperature(predictions: Predictions) -> Temperature | None:
    """Fit the temperature that makes the loss least (Guo et al., arXiv 1706.04599).

    Returns None for too few images, and where none of those for the fit is wrong: there a lower temperature
    is always better, whatever the model is worth.

    Half of the images whose logits are kept are drawn for the fit, always the same.
    """
    usable = predictions.answered[predictions.kept]
    logits, targets = predictions.logits[usable], predictions.targets[predictions.kept[usable]]
    if len(targets) < 4:
        return None
    order = permutation(len(targets), derive_seed("temperature"))
    fitted, judged = order[: len(order) // 2], order[len(order) // 2 :]
    to_fit, answers = logits[fitted].astype(np.float64), targets[fitted]
    if (to_fit.argmax(axis=1) == answers).all():
        return None
    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda log: _loss(to_fit, answers, np.exp(log)), bounds=(low, high), method="bounded"
    )
    value = float(np.exp(found.x))
    held, answers = logits[judged].astype(np.float64), targets[judged]
    right = held.argmax(axis=1) == answers
    sure = [np.exp(log_softmax(held / each, axis=1).max(axis=1)) for each in (1.0, value)]
    return Temperature(
        value=value,
        fitted_on=len(fitted),
        judged_on=len(judged),
        loss=(_loss(held, answers, 1.0), _loss(held, answers, value)),
        ece=(expected_error(sure[0], right), expected_error(sure[1], right)),
        after=reliability(sure[1], right),
    )


def _loss(logits: np.ndarray, targets: np.ndarray, temperature: float) -> float:
    rows = np.arange(len(targets))
    return float(-log_softmax(logits / temperature, axis=1)[rows, targets].mean())


@dataclass(frozen=True)
class Confusion:
    """A class whose images are told to be of another class: how many, and which share of its images."""

    true: int
    told: int
    images: int
    share: float


def most_confused(predictions: Predictions, classes: int, most: int) -> list[Confusion]:
    """Return the pairs of classes that are confused most often, the most frequent first."""
    wrong = predictions.answered & ~predictions.right
    pairs, counts = np.unique(
        predictions.targets[wrong] * classes + predictions.predicted[wrong], return_counts=True
    )
    support = np.bincount(predictions.targets, minlength=classes)
    order = np.argsort(-counts, kind="stable")[:most]
    found = [(*divmod(int(pairs[place]), classes), int(counts[place])) for place in order]
    return [Confusion(true, told, images, images / int(support[true])) for true, told, images in found]


def worst_images(predictions: Predictions, most: int) -> list[int]:
    """Return the places of the images with the largest loss, the largest first."""
    return np.argsort(-predictions.loss, kind="stable")[:most].tolist()


def surest_mistakes(predictions: Predictions, most: int) -> list[int]:
    """Return the places of the wrong images that the model is surest of, the surest first."""
    wrong = np.flatnonzero(predictions.answered & ~predictions.right)
    return wrong[np.argsort(-predictions.probability[wrong], kind="stable")[:most]].tolist()
