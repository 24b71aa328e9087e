"""Turn one image into what a model takes, with the pixels that an evaluation sees.

Shapes: S the model's image size.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.data.decode import BadImageError, Limits, Picture, parse_picture, picture_of, read_file
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.transform import eval_transform, normalise
from deepvit_train.error import DataError


@dataclass(frozen=True)
class ImageTransform:
    """Turns a path, the bytes of a file or a Pillow image into a normalised tensor (3, S, S), float32.

    A Pillow image is taken as it is decoded, and turned upright where its EXIF data say so.

    Args:
        preprocessing: what the model expects.
        limits: what a file may demand, and what values of more than 8 bits mean.
    """

    preprocessing: Preprocessing
    limits: Limits

    def __call__(self, image: str | os.PathLike[str] | bytes | Image.Image) -> Tensor:
        """Decode, resize, crop and normalise an image.

        Raises:
            DataError: there is no such file, or it is no image that can be used.
            TypeError: it is neither a path nor bytes nor a Pillow image.
        """
        try:
            pixels, _ = eval_transform(self.preprocessing)(self._picture(image), seed=0)
        except BadImageError as error:
            raise DataError(str(error)) from None
        mean, std = torch.tensor(self.preprocessing.mean), torch.tensor(self.preprocessing.std)
        return normalise(torch.from_numpy(pixels).permute(2, 0, 1).contiguous()[None], mean, std)[0]

    def _picture(self, image: str | os.PathLike[str] | bytes | Image.Image) -> Picture:
        if isinstance(image, Image.Image):
            return picture_of("image", image, self.limits)
        if isinstance(image, bytes):
            return parse_picture("image", image, self.limits)
        path = os.fspath(image)
        return parse_picture(path, read_file(os.path.expanduser(path), self.limits.max_bytes), self.limits)  # noqa: PTH111


def seen_pixels(
    index: ImageIndex, image: int, preprocessing: Preprocessing, limits: Limits
) -> np.ndarray | None:
    """Return what an evaluation sees of an image, (S, S, 3) uint8; None if it can't be read."""
    try:
        picture = parse_picture(index.path(image), index.read(image, limits.max_bytes), limits)
        pixels, _ = eval_transform(preprocessing)(picture, seed=0)
    except BadImageError:
        return None
    return pixels
