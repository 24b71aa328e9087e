"""Corrupt images after the evaluation crop, by functions of three libraries, in five severities.

These are common corruptions, but not those of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), whose
files were made once at 224 pixels. Where a strength there is the argument of the same operation, it is taken
over here. Lengths are shares of the image's side, so a small image is spoiled as much as a large one.

Shapes: S the model's image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from deepvit_train.data.decode import Picture
from deepvit_train.data.transform import NOTHING_ERASED, Erasure, EvalTransform
from deepvit_train.determinism import derive_seed, seed_generators

# For each corruption its strengths from severity 1 to 5.
STRENGTHS = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # standard deviation, of values in 0..1
    "gaussian_blur": (0.01, 0.015, 0.02, 0.025, 0.03),  # standard deviation, of the side
    "elastic": (0.01, 0.015, 0.02, 0.03, 0.04),  # standard deviation of the shift of a pixel, of the side
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # the smaller image's side, of the side
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "brightness": (1.2, 1.4, 1.7, 2.1, 2.6),  # factor
    "darkness": (0.7, 0.5, 0.35, 0.25, 0.15),  # factor
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # factor of the distance to the mean
    "saturation": (2, 3, 4, 6, 10),  # factor of the distance to grey
}
ELASTIC_BLUR = 0.02  # standard deviation that the shifts of pixels are smoothed with, of the side


@dataclass(frozen=True)
class CorruptedTransform(EvalTransform):
    """Crops as an evaluation does, and then corrupts. Draws come from the seed of the sample alone."""

    corruption: str
    severity: int

    def __call__(self, picture: Picture, seed: int) -> tuple[np.ndarray, Erasure]:
        """Return the corrupted centre of a picture, (S, S, 3) uint8.

        It seeds the global generators, so call it inside `determinism.generators_kept`.
        """
        pixels, _ = super().__call__(picture, seed)
        seed_generators(seed)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        corrupted = corrupt(image, self.corruption, self.severity)
        return corrupted.permute(1, 2, 0).contiguous().numpy(), NOTHING_ERASED


def corruption_seed(corruption: str, severity: int, seed: int) -> int:
    """Return the seed that all draws of a corruption at a severity come from."""
    return derive_seed(f"corruption {corruption}", severity, seed)


def corrupt(image: Tensor, corruption: str, severity: int) -> Tensor:
    """Corrupt an image (3, S, S) uint8. Noise and elastic shifts are drawn from torch's generator."""
    strength, side = STRENGTHS[corruption][severity - 1], image.shape[-1]
    if corruption == "gaussian_noise":
        return F.gaussian_noise(image, sigma=strength)
    if corruption == "gaussian_blur":
        sigma = strength * side
        radius = min(side - 1, max(1, round(4 * sigma)))
        return F.gaussian_blur(image, [2 * radius + 1] * 2, [sigma, sigma])
    if corruption == "elastic":
        return _shift(image, strength * side, ELASTIC_BLUR * side)
    if corruption == "pixelate":
        return _pixelated(image, max(1, round(strength * side)))
    if corruption == "jpeg":
        return _compressed(image, int(strength))
    if corruption == "contrast":
        return F.adjust_contrast(image, strength)
    if corruption == "saturation":
        return F.adjust_saturation(image, strength)
    return F.adjust_brightness(image, strength)


def _pixelated(image: Tensor, small: int) -> Tensor:
    """Make an image so many pixels wide and high, each the mean of those it stands for, and large again."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    means = cv2.resize(pixels, (small, small), interpolation=cv2.INTER_AREA)
    again = cv2.resize(means, (image.shape[-1], image.shape[-2]), interpolation=cv2.INTER_NEAREST_EXACT)
    return torch.from_numpy(again).permute(2, 0, 1)


def _compressed(image: Tensor, quality: int) -> Tensor:
    """Write an image as a JPEG with halved colours, as cameras do, and read it again."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    encoded = simplejpeg.encode_jpeg(pixels, quality, colorsubsampling="420")
    return torch.from_numpy(simplejpeg.decode_jpeg(encoded)).permute(2, 0, 1)


def _shift(image: Tensor, pixels: float, blur: float) -> Tensor:
    """Shift each pixel by about so many pixels, its neighbours nearly alike.

    torchvision blurs noise of -1..1 and multiplies it by alpha / 2. Blurred noise has a standard deviation of
    sqrt(1/3) / (2 sqrt(pi) blur), where the blur is wider than a pixel.
    """
    spread = (1 / 3) ** 0.5 / max(1.0, 2 * np.pi**0.5 * blur)
    return v2.ElasticTransform(alpha=2 * pixels / spread, sigma=blur)(image)
