"""From an RGB image to the model's input: resize, crop, augment, normalise; parts of torchvision and timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from deepvit_train.error import ConfigError
from deepvit_train.schema.data import AugmentConfig
from deepvit_train.schema.model import ModelConfig

Transform = Callable[[Image.Image], Tensor]


def eval_transform(model: ModelConfig) -> Transform:
    """timm's evaluation transform: resize the shorter side to size / crop_pct, centre crop, normalise."""
    transform: Any = create_transform(
        model.image_size,
        interpolation=model.interpolation.value,
        mean=tuple(model.mean),
        std=tuple(model.std),
        crop_pct=model.crop_pct,
    )
    return transform


def train_transform(model: ModelConfig, augment: AugmentConfig) -> Transform:
    """The training transform. Draws from the global generators, so call it inside `determinism.seeded`."""
    interpolation = InterpolationMode(model.interpolation.value)
    steps: list[Callable] = [_crop(model, augment, interpolation)]
    if augment.rotate_degrees or augment.shift or augment.zoom:
        steps.append(
            v2.RandomAffine(
                [-augment.rotate_degrees, augment.rotate_degrees],
                translate=(augment.shift, augment.shift),
                scale=(1 - augment.zoom, 1 + augment.zoom),
                interpolation=InterpolationMode.BILINEAR,
            )
        )
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip(augment.flip))
    if augment.auto_augment:
        steps.append(_policy(augment.auto_augment, model))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(model.mean, model.std)]
    if augment.erase:
        steps.append(RandomErasing(augment.erase, mode="pixel", device="cpu"))
    return v2.Compose(steps)


def denormalise(images: Tensor, model: ModelConfig) -> Tensor:
    """Back to values in 0..1, to be looked at. (B, 3, height, width)."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (model.mean, model.std)
    )
    return (images * std + mean).clamp(0, 1)


def _crop(model: ModelConfig, augment: AugmentConfig, interpolation: InterpolationMode) -> Callable:
    if augment.crop_scale is None:
        resized = int(model.image_size / model.crop_pct)
        return v2.Compose([v2.Resize(resized, interpolation), v2.CenterCrop(model.image_size)])
    return v2.RandomResizedCrop(
        model.image_size, _pair(augment.crop_scale), _pair(augment.crop_ratio), interpolation=interpolation
    )


def _pair(values: list[float]) -> tuple[float, float]:
    low, high = values
    return low, high


def _policy(name: str, model: ModelConfig) -> Callable:
    fill = tuple(round(255 * channel) for channel in model.mean)
    try:
        return rand_augment_transform(
            name, {"translate_const": int(model.image_size * 0.45), "img_mean": fill}
        )
    except (AssertionError, KeyError, ValueError):
        raise ConfigError(
            f"augment.auto_augment={name}: not a policy that timm knows; nearest: rand-m9-mstd0.5-inc1"
        ) from None
