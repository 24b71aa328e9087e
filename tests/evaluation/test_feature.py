"""Features of each block are what the model itself computes there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch

from deepvit_train.config.preset import model_preset
from deepvit_train.data.dataset import Batch
from deepvit_train.error import NotFiniteError
from deepvit_train.evaluation.feature import (
    CLASS_TOKEN,
    MEAN_PATCH,
    features_of,
    fill_bank,
    token_kinds,
)
from deepvit_train.models import DeepViT
from deepvit_train.models.walk import walk_through


def _own(**changes: Any) -> DeepViT:
    torch.manual_seed(0)
    digits = model_preset("digits")
    shape = replace(digits.model, depth=3, dim=16, heads=2, **changes)
    return DeepViT(replace(digits, model=shape), 10).eval()


@pytest.mark.parametrize("registers", [0, 2])
def test_the_last_block_is_what_the_classifier_reads(registers: int) -> None:
    model = _own(registers=registers)
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        tokens = model.forward_features(images)
        found = features_of(walk_through(model), images)
    assert found.shape == (3, 2, 5, 16)
    torch.testing.assert_close(found[-1, 0], tokens[:, 0])
    torch.testing.assert_close(found[-1, 1], tokens[:, 1 + registers :].mean(dim=1))
    # A model that ends after two blocks returns what the second block gives here.
    model.blocks = model.blocks[:2]
    with torch.no_grad():
        torch.testing.assert_close(found[1, 0], model.forward_features(images)[:, 0])


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 32), ("eva02_tiny_patch14_224", 28)])
def test_a_model_of_timm(name: str, size: int) -> None:
    torch.manual_seed(0)
    options: Any = {"img_size": size, "depth": 3, "num_classes": 4}
    model: Any = timm.create_model(name, **options).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.forward_intermediates(
            images, norm=True, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    found = features_of(walk_through(model), images)
    for layer, (patches, prefix) in enumerate(expected):
        torch.testing.assert_close(found[layer, 0], prefix[:, 0])
        torch.testing.assert_close(found[layer, 1], patches.mean(dim=1))


def test_a_model_without_a_class_token_has_the_mean_of_patches() -> None:
    options: Any = {"img_size": 32, "depth": 2, "class_token": False, "global_pool": "avg"}
    walk = walk_through(timm.create_model("vit_tiny_patch16_224", **options).eval())
    assert token_kinds(walk) == [MEAN_PATCH]
    assert token_kinds(walk_through(_own())) == [CLASS_TOKEN, MEAN_PATCH]
    assert features_of(walk, torch.randn(2, 3, 32, 32)).shape == (2, 1, 2, 192)


def test_a_bank_holds_all_batches_in_order() -> None:
    walk = walk_through(_own())
    images, targets = torch.randn(7, 3, 16, 16), torch.arange(7)
    batches = [Batch(images[start : start + 3], targets[start : start + 3], []) for start in (0, 3, 6)]
    bank = fill_bank(walk, batches, 7)
    assert bank.targets.tolist() == targets.tolist()
    torch.testing.assert_close(bank.features, features_of(walk, images))


def test_a_block_that_gives_nan_is_named() -> None:
    model = _own()
    with torch.no_grad():
        next(model.blocks[1].mlp.parameters())[0] = torch.nan
    with pytest.raises(NotFiniteError, match="leave block 1 are NaN"):
        features_of(walk_through(model), torch.randn(1, 3, 16, 16))
