"""Measure the mean and the standard deviation of each colour channel of a data set."""

from __future__ import annotations

import numpy as np

from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.data.decode import BadImageError, Limits, parse_picture
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.transform import eval_transform
from deepvit_train.determinism import derive_seed, permutation


def channel_statistics(
    train: ImageIndex, preprocessing: Preprocessing, limits: Limits, images: int
) -> dict[str, object] | None:
    """Measure mean and standard deviation of each colour channel, of values in 0..1.

    They are of all pixels of a fixed choice of training images, as an evaluation crops them. Returns them as
    values of model.mean and model.std, with the number of images; None if no image can be read.
    """
    order = permutation(len(train), derive_seed("channel statistics"))
    transform, sums, seen = eval_transform(preprocessing), np.zeros((2, 3)), 0
    for image in order[:images].tolist():
        try:
            data = train.read(image, limits.max_bytes)
            pixels, _ = transform(parse_picture(train.path(image), data, limits), seed=0)
        except BadImageError:
            continue
        values = pixels.reshape(-1, 3) / 255
        sums += values.mean(axis=0), (values**2).mean(axis=0)
        seen += 1
    if not seen:
        return None
    mean, squares = sums / seen
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist(), "images": seen}
