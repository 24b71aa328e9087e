"""Declare what a model expects of its images: their size, their range of values, and the evaluation crop."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Choice


class Interpolation(Choice):
    bilinear = "bilinear"
    bicubic = "bicubic"


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images.

    Args:
        image_size: height and width, pixels.
        mean, std: mean and standard deviation of each colour channel, for values in 0..1.
        crop_pct: share of the resized image's side that the evaluation crop keeps.
        interpolation: how images are resized.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: Interpolation

    @property
    def resized(self) -> int:
        """Return the length of an image's shorter side before the evaluation crop, pixels."""
        return int(self.image_size / self.crop_pct)
