"""Show classes of few images more often: which images an epoch takes, and how often each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepvit_train.config.data import Balance
from deepvit_train.determinism import derive_seed, permutation

# A class of n images gets a share of the epoch in proportion to n to this power.
POWERS = {Balance.none: 1.0, Balance.sqrt: 0.5, Balance.uniform: 0.0}


def samples_a_class(targets: np.ndarray, balance: Balance) -> np.ndarray:
    """Return how many samples of each class an epoch takes, (classes,) int64; as many in all as images.

    Args:
        targets: the class of each image, (N,). A class without images takes none.
        balance: uniform: as many of each class; sqrt: in proportion to the square root of its images.
    """
    counts = np.bincount(targets)
    weights = np.where(counts > 0, counts.astype(float) ** POWERS[balance], 0.0)
    exact = weights * (len(targets) / weights.sum())
    # What is left by rounding down goes to the largest fractions, and among equal ones to the first classes.
    samples = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(samples - exact, kind="stable")
    samples[order[: len(targets) - samples.sum()]] += 1
    return samples


@dataclass(frozen=True)
class BalancedOrder:
    """The images of each epoch, some more often than others.

    Args:
        targets: the class of each image, (N,).
        balance: sqrt or uniform.
    """

    targets: np.ndarray
    balance: Balance

    def epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the images of an epoch in order, and how often each was there before, both (N,) int64.

        All images of a class are taken equally often, or once more; which ones, each epoch draws anew.
        """
        images = len(self.targets)
        order = permutation(images, derive_seed("order", seed, epoch))
        # By class, and within a class in the order that was drawn.
        by_class = order[np.argsort(self.targets[order], kind="stable")]
        counts, samples = np.bincount(self.targets), samples_a_class(self.targets, self.balance)
        first = (counts.cumsum() - counts).repeat(samples)
        number = np.arange(images) - (samples.cumsum() - samples).repeat(samples)
        before, place = np.divmod(number, counts.repeat(samples))
        shuffled = permutation(images, derive_seed("balance", seed, epoch))
        return by_class[first + place][shuffled], before[shuffled]
