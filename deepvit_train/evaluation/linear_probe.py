"""Fit a linear classifier to features: scikit-learn's logistic regression, its regularisation chosen.

Shapes: M images, D dim.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

# Values of LogisticRegression's C, the inverse of the regularisation: from the simplest classifier on.
STRENGTHS = (0.001, 0.01, 0.1, 1.0)
MAX_ITERATIONS = 200
HELD_OUT = 5  # one image of so many is held out while the regularisation is chosen


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier.

    Args:
        strength: C, as it was chosen.
        converged: whether the last fit came to its end within MAX_ITERATIONS.
    """

    scaler: StandardScaler
    classifier: LogisticRegression
    strength: float
    converged: bool

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the class of each feature. (M, D) -> (M,)."""
        return np.asarray(self.classifier.predict(np.asarray(self.scaler.transform(features))))


def fit_linear_probe(features: np.ndarray, targets: np.ndarray) -> LinearProbe:
    """Fit a probe to features (M, D), float32, of classes (M,). Their order must be random.

    The last fifth of the images is held out first, each fit beginning at the one before. The smallest C under
    which most of them are right is chosen, and the classifier is fitted to all images with it. Of images too
    few to hold some out C is 1, scikit-learn's own.
    """
    scaler = StandardScaler().fit(features)
    scaled = np.asarray(scaler.transform(features))
    fitted = len(scaled) - len(scaled) // HELD_OUT
    strength = STRENGTHS[-1]
    if len(np.unique(targets[:fitted])) > 1 and fitted < len(scaled):
        classifier = LogisticRegression(max_iter=MAX_ITERATIONS, warm_start=True)
        right = []
        for C in STRENGTHS:
            _fit(classifier.set_params(C=C), scaled[:fitted], targets[:fitted])
            right.append(np.count_nonzero(classifier.predict(scaled[fitted:]) == targets[fitted:]))
        strength = STRENGTHS[int(np.argmax(right))]
    classifier = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS)
    converged = _fit(classifier, scaled, targets)
    return LinearProbe(scaler, classifier, strength, converged)


def _fit(classifier: LogisticRegression, features: np.ndarray, targets: np.ndarray) -> bool:
    """Fit a classifier. Returns whether it converged; the caller tells of it, and so no warning does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features, targets)
    return int(np.max(classifier.n_iter_)) < MAX_ITERATIONS
