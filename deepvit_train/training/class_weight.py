"""How much an image counts in the loss by its class: from the numbers of images, or from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deepvit_train.classes import difference, read_numbers
from deepvit_train.config.loss import BALANCED, CLASS_WEIGHTS, EFFECTIVE, UNWEIGHTED, LossConfig
from deepvit_train.data.index import ImageIndex
from deepvit_train.error import ConfigError, DataError, nearest


def class_weights(loss: LossConfig, train: ImageIndex) -> list[float] | None:
    """Return the weight of each class, or None if all are equal.

    Those that are computed have the mean 1 over the training images, so that a learning rate keeps its
    meaning. A class without images has the weight 1. Those of a file are taken as they are.

    Raises ConfigError for a word that is neither a choice nor a file, DataError for a file that does not give
    each class a positive number.
    """
    if loss.class_weight == UNWEIGHTED:
        return None
    counts = np.bincount(train.targets, minlength=len(train.classes)).astype(np.float64)
    if loss.class_weight == BALANCED:
        return _scaled(counts, counts)
    if loss.class_weight == EFFECTIVE:
        # 1 - beta^n is the effective number of images but for a factor (Cui et al., arXiv 1901.05555).
        return _scaled(-np.expm1(counts * np.log(max(loss.effective_beta, 1e-300))), counts)
    return _of_file(loss.class_weight, train.classes)


def _scaled(sizes: np.ndarray, counts: np.ndarray) -> list[float]:
    """Return one over the size of each class, scaled to a mean of 1 over the images."""
    there = counts > 0
    weights = np.ones_like(counts)
    weights[there] = 1 / sizes[there]
    weights[there] *= counts.sum() / (weights * counts).sum()
    return weights.tolist()


def _of_file(file: str, classes: list[str]) -> list[float]:
    key = f"loss.class_weight={file}"
    if not Path(file).expanduser().exists():
        raise ConfigError(
            f"{key}: is neither {', '.join(CLASS_WEIGHTS)} nor a file{nearest(file, CLASS_WEIGHTS)}"
        )
    found = read_numbers(key, file)
    if problem := difference(list(found), classes):
        raise DataError(f"{key}: names other classes than the model ({problem})")
    for name, value in found.items():
        if value <= 0:
            raise DataError(f"{key}: {name}: {value:g}: must be greater than 0")
    return [found[name] for name in classes]


def describe_weights(weights: list[float], classes: list[str], how: str) -> str:
    """Return a line: 'class weights (balanced): 0.505 (cat) to 50.5 (dog)'."""
    low, high = int(np.argmin(weights)), int(np.argmax(weights))
    told = f"{weights[low]:.3g} ({classes[low]}) to {weights[high]:.3g} ({classes[high]})"
    return f"class weights ({how}): {told}"
