"""Turn a picture into the model's pixels: crop and resize it in one step, then augment it by timm's policies.

Shapes: B batch, S the model's image size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from deepvit_train.config.data import AugmentConfig
from deepvit_train.config.preprocessing import Interpolation, Preprocessing
from deepvit_train.data.crop import centre_crop, crop, random_box
from deepvit_train.data.decode import Picture
from deepvit_train.data.warp import faster
from deepvit_train.determinism import generators_kept, seed_generators
from deepvit_train.error import ConfigError


class Erasure(NamedTuple):
    """A box, in pixels, to fill with noise from a seed. A height of 0 means that nothing is erased."""

    top: int
    left: int
    height: int
    width: int
    seed: int


TRIVIAL = "trivial"  # the one policy of augment.auto_augment that is torchvision's
NOTHING_ERASED = Erasure(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class EvalTransform:
    """Resizes the shorter side to size / crop_pct and takes the centre, as timm does in evaluation."""

    size: int
    resized: int  # length of the shorter side before the crop
    interpolation: Interpolation

    def __call__(self, picture: Picture, seed: int) -> tuple[np.ndarray, Erasure]:
        """Return the centre of a picture, (S, S, 3) uint8, with nothing erased."""
        return centre_crop(picture, self.size, self.resized, self.interpolation), NOTHING_ERASED


@dataclass(frozen=True)
class TrainTransform:
    """Crops a picture at random, resizes, flips and augments it, and chooses a box to erase.

    Every draw comes from the seed of the sample.

    Args:
        size: side of the result, pixels.
        resized: length of the shorter side before the centre crop, if there is no random crop, pixels.
        interpolation: how the picture is resized; None: bilinear or bicubic, as each sample draws.
        crop_scale: bounds of the crop's share of the area; None: the centre crop of evaluation.
        crop_ratio: bounds of its aspect.
        flip, erase: probabilities.
        steps: the augmentations of timm and torchvision; None: none.
    """

    size: int
    resized: int
    interpolation: Interpolation | None
    crop_scale: tuple[float, float] | None
    crop_ratio: tuple[float, float]
    flip: float
    erase: float
    steps: Callable[[Image.Image], Image.Image] | None

    def __call__(self, picture: Picture, seed: int) -> tuple[np.ndarray, Erasure]:
        """Return the augmented picture, (S, S, 3) uint8, and the box to erase once it is normalised.

        It seeds the global generators, which timm and torchvision draw from. So call it inside
        `determinism.generators_kept`.
        """
        draws = random.Random(seed)
        interpolation = self.interpolation or draws.choice(list(Interpolation))
        if self.crop_scale is None:
            pixels = centre_crop(picture, self.size, self.resized, interpolation)
        else:
            box = random_box(draws, picture.height, picture.width, self.crop_scale, self.crop_ratio)
            pixels = crop(picture, box, self.size, interpolation)
        if draws.random() < self.flip:
            # NumPy takes 20 times as long to copy a mirrored view.
            pixels = torch.from_numpy(pixels).flip(1).numpy()
        if self.steps is not None:
            seed_generators(draws.getrandbits(63))
            image = Image.fromarray(pixels)
            if (varied := self.steps(image)) is not image:
                pixels = np.asarray(varied)
        return pixels, random_erasure(draws, self.size) if draws.random() < self.erase else NOTHING_ERASED


Transform = EvalTransform | TrainTransform


def eval_transform(preprocessing: Preprocessing) -> EvalTransform:
    """Return the transform of evaluation."""
    return EvalTransform(preprocessing.image_size, preprocessing.resized, preprocessing.interpolation)


def train_transform(preprocessing: Preprocessing, augment: AugmentConfig) -> Transform:
    """Return the transform of training; that of evaluation where nothing is drawn at random.

    Raises ConfigError for a policy that timm does not know.
    """
    steps: list[Callable] = []
    if augment.rotate_degrees or augment.shift or augment.zoom:
        steps.append(
            v2.RandomAffine(
                [-augment.rotate_degrees, augment.rotate_degrees],
                translate=(augment.shift, augment.shift),
                scale=(1 - augment.zoom, 1 + augment.zoom),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if augment.auto_augment:
        steps.append(build_policy(augment.auto_augment, preprocessing))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    drawn = augment.crop_scale or augment.random_interpolation or augment.flip or augment.erase or steps
    if not drawn:
        return eval_transform(preprocessing)
    return TrainTransform(
        size=preprocessing.image_size,
        resized=preprocessing.resized,
        interpolation=None if augment.random_interpolation else preprocessing.interpolation,
        crop_scale=None if augment.crop_scale is None else _pair(augment.crop_scale),
        crop_ratio=_pair(augment.crop_ratio),
        flip=augment.flip,
        erase=augment.erase,
        steps=v2.Compose(steps) if steps else None,
    )


def random_erasure(draws: random.Random, size: int) -> Erasure:
    """Draw a box of 2 % to a third of the image, with an aspect of 0.3 to 1 / 0.3.

    Source: Zhong et al., arXiv 1708.04896.
    """
    for _ in range(10):
        area = size * size * draws.uniform(0.02, 1 / 3)
        aspect = math.exp(draws.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            top, left = draws.randint(0, size - height), draws.randint(0, size - width)
            return Erasure(top, left, height, width, seed=draws.getrandbits(62))
    return NOTHING_ERASED


def build_policy(name: str, preprocessing: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    """Build timm's policy of this name: RandAugment, AugMix, 3-Augment or AutoAugment.

    'trivial' is torchvision's TrivialAugmentWide. Raises ConfigError for a name that is neither.
    """
    mean = tuple(round(255 * channel) for channel in preprocessing.mean)
    if name == TRIVIAL:
        return v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR, fill=list(mean))
    options = {"translate_const": int(preprocessing.image_size * 0.45), "img_mean": mean}
    try:
        if name.startswith("rand"):
            policy = auto_augment.rand_augment_transform(name, options)
            layers = [policy.ops]
        elif name.startswith("augmix"):
            policy = auto_augment.augment_and_mix_transform(name, options)
            layers = [policy.ops]
        else:
            policy = auto_augment.auto_augment_transform(name, options)
            layers = policy.policy
        for operation in (operation for layer in layers for operation in layer):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
            operation.aug_fn = faster(operation.aug_fn)
        with generators_kept():
            policy(Image.new("RGB", (8, 8)))  # timm reads some settings only when it is called
    except (AssertionError, KeyError, ValueError):
        raise ConfigError(
            f"augment.auto_augment={name}: not a policy that timm knows; nearest: rand-m9-mstd0.5-inc1 or "
            "trivial"
        ) from None
    return policy


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    # With a magnitude of 10 or more RandAugment asks for 0 bits or fewer. Older versions of Pillow gave a
    # black image then; newer ones raise an error.
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def normalise(images: Tensor, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """Normalise (B, 3, S, S) uint8 to float32: (value / 255 - mean) / std, for each colour channel."""
    # It works in place, because on the CPU a second array of this size costs more than the arithmetic. It
    # copies first, because no vectorised kernel subtracts floats from bytes.
    out = images.float() if out is None else out.copy_(images)
    return out.sub_(255 * mean.view(3, 1, 1)).div_(255 * std.view(3, 1, 1))


def denormalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return normalised images (B, 3, height, width) as values in 0..1, to be shown."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (images * std + mean).clamp(0, 1)


def _pair(values: list[float]) -> tuple[float, float]:
    low, high = values
    return low, high
