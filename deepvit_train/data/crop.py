"""Part of a picture, decoded no further than it needs and resized in one step.

Shapes: S the model's image size.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from deepvit_train.config.preprocessing import Interpolation
from deepvit_train.data.decode import Picture

# A JPEG is shrunk while it is decoded only where the crop is still so many times the size wanted: below that
# the result would differ from that of the whole picture (docs/decisions/0009-image-decoding.md).
SPARE_PIXELS = 2
# A picture longer than so many times its width loses its ends before it is resized: they lie outside the
# centre crop, and resizing one of 1 x 100,000 pixels by its shorter side would need gigabytes.
LONGEST = 8


class Box(NamedTuple):
    """Part of a picture, pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(
    draws: random.Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A box of a random share of the area and a random aspect, distributed as RandomResizedCrop's.

    Ten tries to fit one in; else the largest central box whose aspect is within the range.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = draws.randint(0, height - box_height), draws.randint(0, width - box_width)
            return Box(top, left, box_height, box_width)
    box_width = min(width, max(1, round(height * ratio[1])))
    box_height = min(height, max(1, round(width / ratio[0])))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def crop(picture: Picture, box: Box, size: int, interpolation: Interpolation) -> np.ndarray:
    """The box of a picture, resized to (S, S, 3) uint8 with antialiasing, as Pillow resizes. Decodes."""
    box, shrink = snapped(box, size)
    pixels, shrunk = picture.pixels(shrink, rows=box.top + box.height)
    top, left, height, width = (length // shrunk for length in box)
    return resize(pixels[top : top + height, left : left + width], size, size, interpolation)


def snapped(box: Box, size: int) -> tuple[Box, int]:
    """The factor to shrink by in decoding, 1 unless the box is large, and the box in its multiples.

    A box between two shrunk pixels would be off by half a pixel; this one is smaller by less than 1 / 2S.
    """
    spare = min(box.height, box.width) // (SPARE_PIXELS * size)
    shrink = max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))
    return Box(*(length // shrink * shrink for length in box)), shrink


def centre_crop(picture: Picture, size: int, resized: int, interpolation: Interpolation) -> np.ndarray:
    """Resize the shorter side to `resized` pixels and take the centre, (S, S, 3) uint8. Decodes."""
    pixels, _ = picture.pixels()
    pixels = _centre(pixels, LONGEST * picture.width, LONGEST * picture.height)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    pixels = resize(pixels, resized * height // shorter, resized * width // shorter, interpolation)
    return _centre(pixels, size, size)


def resize(pixels: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    """Resize (H, W, 3) uint8 with antialiasing; torch's kernel needs a sixth of Pillow's time."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # Channels last in memory, and by the batch stride too, so that the kernel takes its fast way in and out.
    # NumPy copies part of a picture in half of torch's time.
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    images = F.interpolate(images, (height, width), mode=interpolation.value, antialias=True)
    return images[0].permute(1, 2, 0).numpy()


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central part of (H, W, 3), at most so high and wide; offsets are rounded as torchvision's."""
    height, width = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]
