"""Nearest neighbours give scikit-learn's answers under the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from deepvit_train.evaluation.neighbour import NEIGHBOURS, TEMPERATURE, classify_by_neighbours

CLASSES = 7


def _clusters(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions of overlapping classes: a centre for each, and noise that is larger."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CLASSES, 12))
    targets = rng.integers(0, CLASSES, images)
    features = centres[targets] + rng.normal(scale=1.5, size=(images, 12))
    return F.normalize(torch.from_numpy(features).float(), dim=-1), torch.from_numpy(targets)


@pytest.mark.parametrize("chunk", [7, 99, 1000])
def test_votes_are_those_of_scikit_learn(chunk: int) -> None:
    known, targets = _clusters(500, seed=1)
    asked, truth = _clusters(200, seed=2)
    found = classify_by_neighbours(asked, known, targets, CLASSES, chunk=chunk)
    for count, guesses in zip(NEIGHBOURS, found, strict=True):
        oracle = KNeighborsClassifier(
            n_neighbors=count,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / TEMPERATURE),
        ).fit(known.double().numpy(), targets.numpy())
        assert guesses.tolist() == oracle.predict(asked.double().numpy()).tolist()
    accuracies = [float((guesses == truth).float().mean()) for guesses in found]
    assert all(0.4 < accuracy < 0.99 for accuracy in accuracies)  # a task that is neither trivial nor noise


def test_a_near_neighbour_outweighs_several_far_ones() -> None:
    known = F.normalize(torch.tensor([[1.0, 0.05], [1.0, 1.0], [1.0, 1.1], [0.0, 1.0]]), dim=-1)
    asked = torch.tensor([[1.0, 0.0]])
    targets = torch.tensor([2, 1, 1, 0])
    # exp(0.9988 / 0.07) against exp(0.707 / 0.07) + exp(0.673 / 0.07): the one near wins over the two.
    assert classify_by_neighbours(asked, known, targets, 3, [3])[0].tolist() == [2]
    # Without their weights the two would win.
    assert torch.bincount(targets[:3]).argmax() == 1
