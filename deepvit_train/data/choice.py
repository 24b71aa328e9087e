"""Which images an evaluation takes when it may not take all of them."""

from __future__ import annotations

import numpy as np

from deepvit_train.determinism import derive_seed, permutation


def spread_over_classes(targets: np.ndarray, count: int) -> np.ndarray:
    """Choose images evenly over the classes: from each as many as from any other, or one more.

    A class that has too few gives all it has. The choice is always the same, and a larger one holds a
    smaller one.

    Args:
        targets: the class of each image, (N,).
        count: how many images to choose, at most N of them.

    Returns the numbers of the images, in ascending order.
    """
    order = permutation(len(targets), derive_seed("spread over classes"))
    drawn = targets[order]
    by_class = np.argsort(drawn, kind="stable")
    first_of_class = np.searchsorted(drawn[by_class], drawn[by_class])
    turn = np.empty(len(targets), np.int64)  # the how-many-th of its class each image was drawn
    turn[by_class] = np.arange(len(targets)) - first_of_class
    return np.sort(order[np.argsort(turn, kind="stable")[:count]])
