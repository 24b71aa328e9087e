"""Compare pixels that OpenCV moves with the same operations of timm, which Pillow carries out."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from timm.data import auto_augment

from deepvit_train.config.compose import compose_command
from deepvit_train.data.transform import build_policy
from deepvit_train.data.warp import MATRICES, faster
from deepvit_train.determinism import generators_kept, seed_generators

FILL = (255, 0, 255)
LARGEST = {"rotate": 30.0, "shear": 0.3, "abs": 60.0, "rel": 0.45}


@pytest.mark.parametrize("operation", MATRICES, ids=lambda operation: operation.__name__)
def test_pixels_come_from_where_pillow_takes_them(operation, photographs: list[Path]) -> None:
    name = operation.__name__
    (largest,) = [amount for word, amount in LARGEST.items() if word in name]
    draws = random.Random(name)
    for file in photographs[:20]:
        image = Image.open(file).convert("RGB").resize((160, 120))
        amount = draws.uniform(-largest, largest)
        options = {"resample": Image.Resampling.BILINEAR}
        pillows = operation(image, amount, fillcolor=FILL, **options)
        ours = faster(operation)(image, amount, fillcolor=FILL, **options)
        off = np.abs(np.asarray(ours).astype(int) - np.asarray(pillows)).max(axis=2)
        within, without = _inside_and_out(operation, image.size, amount, options)
        assert off[within].mean() < 1.5, "the greatest of three channels; a shift by half a pixel gives 5"
        assert np.quantile(off[within], 0.999) <= 8
        assert off[without].max(initial=0) == 0


def _inside_and_out(operation, size: tuple[int, int], amount: float, options: dict) -> tuple:
    """Where the result shows the picture, and where the fill, both away from the picture's edge."""
    inner = Image.new("L", size)
    inner.paste(255, (2, 2, size[0] - 2, size[1] - 2))
    shown = operation(inner, amount, fillcolor=0, **options)
    whole = operation(Image.new("L", size, 255), amount, fillcolor=0, **options)
    return (
        np.asarray(shown.filter(ImageFilter.MinFilter(3))) == 255,
        np.asarray(whole.filter(ImageFilter.MaxFilter(3))) == 0,
    )


def test_a_policy_gives_the_pictures_that_timms_own_gives(photographs: list[Path]) -> None:
    image = Image.open(photographs[0]).convert("RGB").resize((224, 224))
    model = compose_command("train", ["model=deepvit_s"]).model
    policy = build_policy("rand-m8-n1-p1.0-inc1", model.preprocessing)
    options = {
        "translate_const": int(224 * 0.45),
        "img_mean": tuple(round(255 * channel) for channel in model.mean),
        "interpolation": Image.Resampling.BILINEAR,
    }
    timms = auto_augment.rand_augment_transform("rand-m8-n1-p1.0-inc1", options)
    same = 0
    for seed in range(60):
        pictures = []
        for one in (policy, timms):
            with generators_kept():
                seed_generators(seed)
                pictures.append(np.asarray(one(image)).astype(int))
        off = np.abs(pictures[0] - pictures[1])
        same += not off.any()
        assert np.median(off) <= 2, f"seed {seed}: another picture"
    assert 30 < same < 50, "ten of fifteen operations move nothing: the same bytes"
