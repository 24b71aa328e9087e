"""From a picture to the model's pixels: crop and resize in one step, then augment; policies are timm's.

Shapes: S the model's image size.
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
    """A box to fill with noise from a seed; nothing where its height is 0."""

    top: int
    left: int
    height: int
    width: int
    seed: int


NOTHING_ERASED = Erasure(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class EvalTransform:
    """The shorter side to size / crop_pct, then the centre crop, as timm evaluates."""

    size: int
    resized: int  # length of the shorter side before the crop
    interpolation: Interpolation

    def __call__(self, picture: Picture, seed: int) -> tuple[np.ndarray, Erasure]:
        """The centre of a picture, (S, S, 3) uint8, with nothing erased."""
        return centre_crop(picture, self.size, self.resized, self.interpolation), NOTHING_ERASED


@dataclass(frozen=True)
class TrainTransform:
    """A random crop, resized, flipped, varied by the steps; which box to erase. Draws from the seed alone."""

    size: int
    resized: int  # for the evaluation crop, where there is no random one
    interpolation: Interpolation
    crop_scale: tuple[float, float] | None
    crop_ratio: tuple[float, float]
    flip: float
    erase: float
    steps: Callable[[Image.Image], Image.Image] | None

    def __call__(self, picture: Picture, seed: int) -> tuple[np.ndarray, Erasure]:
        """The varied picture, (S, S, 3) uint8, and the box to erase once it is normalised.

        Seeds the global generators, for the steps of timm and torchvision: call it inside
        `determinism.generators_kept`.
        """
        draws = random.Random(seed)
        if self.crop_scale is None:
            pixels = centre_crop(picture, self.size, self.resized, self.interpolation)
        else:
            box = random_box(draws, picture.height, picture.width, self.crop_scale, self.crop_ratio)
            pixels = crop(picture, box, self.size, self.interpolation)
        if draws.random() < self.flip:
            # NumPy's copy of a mirrored view takes 20 times as long.
            pixels = torch.from_numpy(pixels).flip(1).numpy()
        if self.steps is not None:
            seed_generators(draws.getrandbits(63))
            image = Image.fromarray(pixels)
            if (varied := self.steps(image)) is not image:
                pixels = np.asarray(varied)
        return pixels, random_erasure(draws, self.size) if draws.random() < self.erase else NOTHING_ERASED


Transform = EvalTransform | TrainTransform


def eval_transform(preprocessing: Preprocessing) -> EvalTransform:
    """How a picture is evaluated."""
    return EvalTransform(preprocessing.image_size, preprocessing.resized, preprocessing.interpolation)


def train_transform(preprocessing: Preprocessing, augment: AugmentConfig) -> TrainTransform:
    """How a picture is varied in training."""
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
    return TrainTransform(
        size=preprocessing.image_size,
        resized=preprocessing.resized,
        interpolation=preprocessing.interpolation,
        crop_scale=None if augment.crop_scale is None else _pair(augment.crop_scale),
        crop_ratio=_pair(augment.crop_ratio),
        flip=augment.flip,
        erase=augment.erase,
        steps=v2.Compose(steps) if steps else None,
    )


def random_erasure(draws: random.Random, size: int) -> Erasure:
    """A box of 2 % to a third of the image, of aspect 0.3 to 1 / 0.3 (Zhong et al., arXiv 1708.04896)."""
    for _ in range(10):
        area = size * size * draws.uniform(0.02, 1 / 3)
        aspect = math.exp(draws.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            top, left = draws.randint(0, size - height), draws.randint(0, size - width)
            return Erasure(top, left, height, width, seed=draws.getrandbits(62))
    return NOTHING_ERASED


def build_policy(name: str, preprocessing: Preprocessing) -> Callable[[Image.Image], Image.Image]:
    """timm's policy of this name: RandAugment, AugMix, 3-Augment, AutoAugment. Raises ConfigError."""
    options = {
        "translate_const": int(preprocessing.image_size * 0.45),
        "img_mean": tuple(round(255 * channel) for channel in preprocessing.mean),
    }
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
            policy(Image.new("RGB", (8, 8)))  # timm looks at some settings no sooner
    except (AssertionError, KeyError, ValueError):
        raise ConfigError(
            f"augment.auto_augment={name}: not a policy that timm knows; nearest: rand-m9-mstd0.5-inc1"
        ) from None
    return policy


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    # RandAugment asks for 0 bits, or fewer, where its magnitude is 10 or more. That gave a black image until
    # Pillow began to raise an error; timm calls it all the same.
    return auto_augment.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def normalise(images: Tensor, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, 3, S, S) uint8 to float32: values in 0..1 less the mean, by the standard deviation."""
    # In place: on the CPU a second array of this size costs more than all three. The copy first: no kernel
    # subtracts floats from bytes by vectors.
    out = images.float() if out is None else out.copy_(images)
    return out.sub_(255 * mean.view(3, 1, 1)).div_(255 * std.view(3, 1, 1))


def denormalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Back to values in 0..1, to be looked at. (B, 3, height, width)."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return (images * std + mean).clamp(0, 1)


def _pair(values: list[float]) -> tuple[float, float]:
    low, high = values
    return low, high
