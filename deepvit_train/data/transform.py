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
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from deepvit_train.data.decode import Picture
from deepvit_train.determinism import seed_generators
from deepvit_train.error import ConfigError
from deepvit_train.schema.data import AugmentConfig
from deepvit_train.schema.model import Interpolation, ModelConfig

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
            pixels = np.asarray(self.steps(Image.fromarray(pixels)))
        return pixels, random_erasure(draws, self.size) if draws.random() < self.erase else NOTHING_ERASED


Transform = EvalTransform | TrainTransform


def eval_transform(model: ModelConfig) -> EvalTransform:
    """How a picture is evaluated."""
    return EvalTransform(model.image_size, _resized(model), model.interpolation)


def train_transform(model: ModelConfig, augment: AugmentConfig) -> TrainTransform:
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
        steps.append(build_policy(augment.auto_augment, model))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    return TrainTransform(
        size=model.image_size,
        resized=_resized(model),
        interpolation=model.interpolation,
        crop_scale=None if augment.crop_scale is None else _pair(augment.crop_scale),
        crop_ratio=_pair(augment.crop_ratio),
        flip=augment.flip,
        erase=augment.erase,
        steps=v2.Compose(steps) if steps else None,
    )


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


def crop(picture: Picture, box: Box, size: int, interpolation: Interpolation) -> np.ndarray:
    """The box of a picture, resized to (S, S, 3) uint8 with antialiasing, as Pillow resizes. Decodes."""
    box, shrink = snapped(box, size)
    pixels, shrunk = picture.pixels(shrink)
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
    # Channels last in memory, which the fast kernel wants; a view of part of a picture is not.
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    images = F.interpolate(images, (height, width), mode=interpolation.value, antialias=True)
    return images[0].permute(1, 2, 0).numpy()


def build_policy(name: str, model: ModelConfig) -> Callable[[Image.Image], Image.Image]:
    """timm's policy of this name: RandAugment, AugMix, 3-Augment, AutoAugment. Raises ConfigError."""
    options = {
        "translate_const": int(model.image_size * 0.45),
        "img_mean": tuple(round(255 * channel) for channel in model.mean),
        # Bicubic turns and shears take two to three times as long; timm draws one of both by default.
        "interpolation": Image.Resampling.BILINEAR,
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
    except (AssertionError, KeyError, ValueError):
        raise ConfigError(
            f"augment.auto_augment={name}: not a policy that timm knows; nearest: rand-m9-mstd0.5-inc1"
        ) from None
    for operation in (operation for layer in layers for operation in layer):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image.Image, bits: int, **options: object) -> Image.Image:
    # RandAugment asks for 0 bits where noise lifts its magnitude to 10. That gave a black image until Pillow
    # began to raise an error; timm calls it all the same.
    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def normalise(images: Tensor, mean: Tensor, std: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, 3, S, S) uint8 to float32: values in 0..1 less the mean, by the standard deviation."""
    # In place: on the CPU a second array of this size costs more than both operations.
    return torch.sub(images, 255 * mean.view(3, 1, 1), out=out).div_(255 * std.view(3, 1, 1))


def denormalise(images: Tensor, model: ModelConfig) -> Tensor:
    """Back to values in 0..1, to be looked at. (B, 3, height, width)."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (model.mean, model.std)
    )
    return (images * std + mean).clamp(0, 1)


def _centre(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The central part of (H, W, 3), at most so high and wide; offsets are rounded as torchvision's."""
    height, width = min(height, pixels.shape[0]), min(width, pixels.shape[1])
    top, left = round((pixels.shape[0] - height) / 2), round((pixels.shape[1] - width) / 2)
    return pixels[top : top + height, left : left + width]


def _resized(model: ModelConfig) -> int:
    return int(model.image_size / model.crop_pct)


def _pair(values: list[float]) -> tuple[float, float]:
    low, high = values
    return low, high
