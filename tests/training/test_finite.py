"""Notice NaN and infinity, and trace them to where they first appear."""

from __future__ import annotations

import math

import pytest
import torch

from deepvit_train.config.recipe import Precision
from deepvit_train.error import NotFiniteError
from deepvit_train.training.finite import FiniteGuard, first_non_finite
from tests.training.test_step import WORLD, batch, state_of


def test_a_loss_that_is_not_finite_is_named_when_it_is_looked_at() -> None:
    guard = FiniteGuard(WORLD, scaled=False)
    for number, loss in enumerate([1.0, math.inf, 1.0, math.nan], start=1):
        guard.observe(number, torch.tensor(loss), torch.tensor(2.0))
    with pytest.raises(NotFiniteError, match="step 2: the loss is inf"):
        guard.check()


def test_a_finite_run_passes_the_guard() -> None:
    guard = FiniteGuard(WORLD, scaled=False)
    guard.observe(1, torch.tensor(1.0), torch.tensor(2.0))
    guard.check()


@pytest.mark.parametrize("place", ["patch_embed", "blocks.1", "head", "the images", "the backward pass"])
def test_where_values_first_stop_being_finite(place: str) -> None:
    model, images = state_of().model, batch()
    if place == "the images":
        images = images._replace(images=images.images / 0)
    elif place != "the backward pass":
        model.get_submodule(place).register_forward_hook(lambda module, inputs, output: output * math.nan)
    found = first_non_finite(model, [images], WORLD, Precision.fp32)
    assert found == ({place} if place != "the backward pass" else set())


def test_a_rank_that_saw_nothing_says_whose_loss_was_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = FiniteGuard(WORLD, scaled=True)
    monkeypatch.setattr(type(WORLD), "largest", lambda self, number: [max(number, 4)])
    with pytest.raises(NotFiniteError, match="step 4: the loss of another rank"):
        guard.check()
