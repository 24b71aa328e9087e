"""The mean corruption error of ImageNet-C.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", arXiv 1903.12261, section 4.2: CE_c is the sum of a model's errors over the five severities of
corruption c, over the sum of AlexNet's, and mCE is the mean of CE_c over fifteen corruptions, in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

SEVERITIES = 5
# AlexNet's error, the mean over the severities, as in the authors' repository (hendrycks/robustness).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def corruption_error(corruption: str, accuracies: Sequence[float]) -> float | None:
    """Return CE in percent of a corruption's top-1 accuracies by severity.

    Returns None if not all five severities are there, or if the corruption is not one of the fifteen.
    """
    if corruption not in ALEXNET_ERRORS or len(accuracies) != SEVERITIES:
        return None
    error = sum(1 - accuracy for accuracy in accuracies)
    return 100 * error / (SEVERITIES * ALEXNET_ERRORS[corruption])


def mean_corruption_error(accuracies: Mapping[str, Sequence[float]]) -> float | None:
    """Return mCE in percent, or None if one of the corruptions, or of their severities, is missing."""
    errors = [corruption_error(name, accuracies.get(name, ())) for name in ALEXNET_ERRORS]
    known = [error for error in errors if error is not None]
    return sum(known) / len(known) if len(known) == len(errors) else None
