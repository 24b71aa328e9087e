"""The linear probe is scikit-learn's, and its regularisation is chosen on images that were held out."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from deepvit_train.evaluation import linear_probe
from deepvit_train.evaluation.linear_probe import STRENGTHS, fit_linear_probe


def _draw(images: int, dim: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, images)
    features = rng.normal(scale=noise, size=(images, dim))
    features[np.arange(images), targets] += 1
    return features.astype(np.float32) * 5 + 2, targets


@pytest.mark.parametrize(("dim", "noise"), [(4, 0.1), (60, 0.6)])
def test_the_choice_and_the_fit_are_those_made_by_hand(dim: int, noise: float) -> None:
    features, targets = _draw(150, dim, noise, seed=3)
    probe = fit_linear_probe(features, targets)
    scaled = StandardScaler().fit_transform(features)
    shares = [
        LogisticRegression(C=strength, max_iter=1000)
        .fit(scaled[:120], targets[:120])
        .score(scaled[120:], targets[120:])
        for strength in STRENGTHS
    ]
    assert probe.strength == STRENGTHS[int(np.argmax(shares))]
    unseen, _ = _draw(80, dim, noise, seed=4)
    oracle = LogisticRegression(C=probe.strength, max_iter=1000).fit(scaled, targets)
    expected = oracle.predict(StandardScaler().fit(features).transform(unseen))
    assert (probe.predict(unseen) == expected).mean() > 0.98  # float32, and another end of the iterations
    assert probe.converged


def test_noise_gets_a_strong_regularisation() -> None:
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(60, 100)).astype(np.float32), rng.integers(0, 2, 60)
    assert fit_linear_probe(features, targets).strength < STRENGTHS[-1]


def test_a_fit_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 2)
    assert not fit_linear_probe(*_draw(150, 60, 0.6, seed=3)).converged


def test_a_class_that_only_the_held_out_images_have() -> None:
    features, targets = _draw(20, 4, 0.1, seed=5)
    targets[:] = 0
    targets[-2:] = 1
    features[-2:] += 30
    assert fit_linear_probe(features, targets).predict(features).tolist() == targets.tolist()
