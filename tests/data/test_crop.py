"""Compare crops with Pillow's and torchvision's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from deepvit_train.config.preprocessing import Interpolation
from deepvit_train.data.crop import Box, crop, random_box, snapped
from deepvit_train.data.decode import Limits, Picture
from tests.data.picture import open_picture

LIMITS = Limits(max_bytes=10**8, max_pixels=10**8)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes(files: list[Path], seed: int) -> Iterator[tuple[Picture, Box]]:
    draws = random.Random(seed)
    for file in files:
        picture = open_picture(str(file), LIMITS)
        yield picture, random_box(draws, picture.height, picture.width, SCALE, RATIO)


@pytest.mark.parametrize("size", [224, 64, 32])
def test_a_crop_is_pillows_bicubic_crop(photographs: list[Path], size: int) -> None:
    shrunk, errors = 0, []
    for picture, drawn in boxes(photographs, seed=size):
        box, shrink = snapped(drawn, size)
        shrunk += shrink > 1
        ours = crop(picture, drawn, size, Interpolation.bicubic).astype(int)
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        theirs = Image.open(picture.path).resize((size, size), Image.Resampling.BICUBIC, box=edges)
        errors.append(np.abs(ours - np.asarray(theirs)).mean())
    assert max(errors) < 2
    assert np.mean(errors) < (0.1 if size == 224 else 1)
    assert (shrunk > 20) == (size < 224)


def test_a_shrunk_box_is_nearly_the_box_drawn() -> None:
    draws = random.Random(0)
    for _ in range(1000):
        box = random_box(draws, 2001, 3003, SCALE, RATIO)
        near, shrink = snapped(box, 224)
        assert near.top + near.height <= 2001
        assert near.left + near.width <= 3003
        for ours, drawn in zip(near, box, strict=True):
            assert ours % shrink == 0
            assert 0 <= drawn - ours < max(1, min(box[2:]) / (2 * 224))


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (1000, 100), (30, 3000), (1, 1)])
def test_boxes_are_distributed_as_random_resized_crops(size: tuple[int, int]) -> None:
    width, height = size
    draws = random.Random(1)
    torch.manual_seed(1)
    ours = np.array([random_box(draws, height, width, SCALE, RATIO) for _ in range(4000)])
    blank = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(4000)])
    for measure in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 0.001
