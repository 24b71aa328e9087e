"""Corruptions depend on seed, corruption, severity and image alone, and each severity spoils more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data as photographs

from deepvit_train.config.compose import compose_command
from deepvit_train.config.suite import CORRUPTIONS, SEVERITIES
from deepvit_train.data.corruption import STRENGTHS, corrupt
from deepvit_train.data.index import scan_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.determinism import seeded
from deepvit_train.distributed.world import World
from tests.conftest import slowly


def _photograph(side: int) -> torch.Tensor:
    whole = torch.from_numpy(photographs.astronaut()).permute(2, 0, 1)
    return torch.nn.functional.interpolate(whole[None].float(), side, mode="area")[0].round().to(torch.uint8)


def _corrupted(image: torch.Tensor, corruption: str, severity: int, seed: int = 0) -> torch.Tensor:
    with seeded(seed):
        return corrupt(image, corruption, severity)


def test_every_name_has_a_strength_for_each_severity() -> None:
    assert tuple(STRENGTHS) == CORRUPTIONS
    assert all(len(each) == len(SEVERITIES) for each in STRENGTHS.values())
    assert compose_command("eval", ["checkpoint=x"]).suite.corruptions == list(CORRUPTIONS)


@pytest.mark.parametrize("side", [32, 224])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_each_severity_is_farther_from_the_image(corruption: str, side: int) -> None:
    image = _photograph(side)
    errors = []
    for severity in SEVERITIES:
        spoiled = _corrupted(image, corruption, severity)
        assert (spoiled.shape, spoiled.dtype) == (image.shape, torch.uint8)
        errors.append(float((spoiled.float() - image.float()).pow(2).mean().sqrt()))
    assert errors[0] > 0.2  # of 255
    assert errors == sorted(errors)
    assert errors[-1] > 1.2 * errors[0]


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_smallest_image_that_a_model_may_have(corruption: str) -> None:
    for side in (4, 8):
        assert _corrupted(_photograph(side), corruption, 5).shape == (3, side, side)


def test_noise_has_the_deviation_that_it_says() -> None:
    grey = torch.full((3, 224, 224), 128, dtype=torch.uint8)
    noise = _corrupted(grey, "gaussian_noise", 1).float() - 128
    assert float(noise.std()) == pytest.approx(0.08 * 255, rel=0.02)


def test_elastic_shifts_are_as_long_as_they_say() -> None:
    # A ramp turns a shift into a difference of values: one level a pixel.
    ramp = torch.arange(224, dtype=torch.uint8).expand(3, 224, 224).contiguous()
    shifts = (_corrupted(ramp, "elastic", 3).float() - ramp.float())[:, 30:-30, 30:-30]
    assert float(shifts.std()) == pytest.approx(0.02 * 224, rel=0.25)


def test_pixelated_images_have_as_many_values_as_pixels_are_left() -> None:
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(0, 256, (3, 40, 40), dtype=np.uint8))
    rows = _corrupted(noise, "pixelate", 5)
    assert len({tuple(row) for row in rows[0].tolist()}) == 10


def _read(root: Path, seed: int, corruption: str, severity: int, *overrides: str) -> list[Any]:
    config = compose_command("train", [f"data.root={root}", *overrides])
    loaders = Loaders(config.model.preprocessing, config.data, World(0, 1, torch.device("cpu")))
    index = scan_split(root, "val", False)
    batches = loaders.corrupted(index, corruption, severity, seed, batch_size=2)
    return [image.clone() for batch in batches for image in batch.images]


@pytest.mark.parametrize("corruption", ["gaussian_noise", slowly("elastic")])
def test_draws_depend_on_seed_severity_and_image_alone(image_folder: Path, corruption: str) -> None:
    alone = _read(image_folder, 0, corruption, 2, "data.workers=0")
    torch.manual_seed(7)  # what was drawn before does not matter
    assert all(map(torch.equal, alone, _read(image_folder, 0, corruption, 2, "data.workers=2")))
    for other in (
        _read(image_folder, 1, corruption, 2, "data.workers=0"),
        _read(image_folder, 0, corruption, 3, "data.workers=0"),
    ):
        assert not any(map(torch.equal, alone, other))
