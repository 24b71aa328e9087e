"""Crop a picture and resize the crop in one step, decoding no more of the picture than that needs.

Shapes: H height, W width, S the model's image size.
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

# A JPEG may be shrunk while it is decoded as long as the crop keeps this many times the wanted size. If it
# kept fewer pixels, the result would differ from a crop of the whole picture
# (docs/decisions/0009-image-decoding.md).
SPARE_PIXELS = 2
# A picture longer than this many times its width loses its ends before it is resized. They lie outside the
# centre crop, and resizing a picture of 1 x 100,000 pixels by its shorter side would need gigabytes.
LONGEST = 8


class Box(NamedTuple):
    """A part of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_box(
    draws: random.Random, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Draw a box as torchvision's RandomResizedCrop does.

    If ten draws give none that fits, return the largest central box whose aspect is within the range.

    Args:
        draws: the random generator.
        height, width: size of the picture, pixels.
        scale: bounds of the box's share of the area.
        ratio: bounds of its aspect, width / height.
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
    """Decode a box of a picture, and resize it to (S, S, 3) uint8 with antialiasing, as Pillow does.

    Raises BadImageError for a damaged file.
    """
    box, shrink = snapped(box, size)
    pixels, shrunk = picture.pixels(shrink, rows=box.top + box.height)
    top, left, height, width = (length // shrunk for length in box)
    return resize(pixels[top : top + height, left : left + width], size, size, interpolation)


def snapped(box: Box, size: int) -> tuple[Box, int]:
    """Return the box in multiples of a factor, and the factor to shrink by in decoding: 1, 2, 4 or 8.

    A box that ends between two shrunk pixels would be off by half a pixel. The box returned is smaller than
    the one given, but by less than 1 / 2S of its side.
    """
    spare = min(box.height, box.width) // (SPARE_PIXELS * size)
    shrink = max(factor for factor in (1, 2, 4, 8) if factor <= max(1, spare))
    return Box(*(length // shrink * shrink for length in box)), shrink


def centre_crop(picture: Picture, size: int, resized: int, interpolation: Interpolation) -> np.ndarray:
    """Decode a picture, resize its shorter side to `resized` pixels, and return the centre (S, S, 3), uint8.

    Raises BadImageError for a damaged file.
    """
    pixels, _ = picture.pixels()
    pixels = _centre(pixels, LONGEST * picture.width, LONGEST * picture.height)
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    pixels = resize(pixels, resized * height // shorter, resized * width // shorter, interpolation)
    return _centre(pixels, size, size)


def resize(pixels: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    """Resize (H, W, 3) uint8 with antialiasing. torch's kernel needs a sixth of Pillow's time."""
    if pixels.shape[:2] == (height, width):
        return pixels
    # The kernel is fast for channels last, which the strides must show, that of the batch included. NumPy
    # copies part of a picture in half of torch's time.
    images = torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
    images = F.interpolate(images, (height, width), mode=interpolation.value, antialias=True)
    return images[0].permute(1, 2, 0).numpy()


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the centre of pixels (H, W, 3), at most `height` x `width`, with torchvision's rounding."""
    height, width = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]
