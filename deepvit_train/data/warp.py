"""Carry out timm's rotations, shears and translations with OpenCV, in a quarter of Pillow's time.

timm still draws the operations and their magnitudes. The pixels differ from Pillow's by half a level in the
mean: OpenCV rounds where Pillow cuts off, takes coordinates to 1/32 of a pixel, and blends the picture's last
pixel with the fill (docs/decisions/0009-image-decoding.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image
from timm.data import auto_augment

# The loader processes already run in parallel, and a pool of threads does not survive their fork.
cv2.setNumThreads(1)

Operation = Callable[..., Image.Image]
# (a, b, c, d, e, f): the pixel at (x, y) of the result comes from (a x + b y + c, d x + e y + f). As in
# Pillow, (0, 0) is the corner of the first pixel.
Matrix = tuple[float, float, float, float, float, float]


def faster(operation: Operation) -> Operation:
    """Return a function that does the same as an operation of timm that moves pixels, with OpenCV.

    It always interpolates bilinearly. An operation that moves no pixels is returned as it is.
    """
    if operation not in MATRICES:
        return operation

    def moved(image: Image.Image, amount: float, *, fillcolor: tuple[int, ...], **_: object) -> Image.Image:
        return warp(image, MATRICES[operation](*image.size, amount), fillcolor)

    return moved


def warp(image: Image.Image, matrix: Matrix, fill: tuple[int, ...]) -> Image.Image:
    """Move the pixels of an RGB image as the matrix says. Pixels from outside the image are `fill`."""
    a, b, c, d, e, f = matrix
    # In OpenCV (0, 0) is the centre of the first pixel.
    centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return Image.fromarray(
        cv2.warpAffine(np.asarray(image), centred, image.size, flags=flags, borderValue=fill)
    )


def _rotate(width: int, height: int, degrees: float) -> Matrix:
    """Return the matrix that rotates counter-clockwise about the centre."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y


# The matrices that timm's operations pass to Pillow, as functions of width, height and amount.
MATRICES: dict[Operation, Callable[[int, int, float], Matrix]] = {
    auto_augment.rotate: _rotate,
    auto_augment.shear_x: lambda _, __, slope: (1, slope, 0, 0, 1, 0),
    auto_augment.shear_y: lambda _, __, slope: (1, 0, 0, slope, 1, 0),
    auto_augment.translate_x_abs: lambda _, __, pixels: (1, 0, pixels, 0, 1, 0),
    auto_augment.translate_y_abs: lambda _, __, pixels: (1, 0, 0, 0, 1, pixels),
    auto_augment.translate_x_rel: lambda width, _, share: (1, 0, share * width, 0, 1, 0),
    auto_augment.translate_y_rel: lambda _, height, share: (1, 0, 0, 0, 1, share * height),
}
