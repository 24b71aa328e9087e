"""Builds the mixing of images and the averaged weights, from timm."""

from __future__ import annotations

from timm.data import Mixup
from timm.utils import ModelEmaV3

from deepvit_train.config.data import AugmentConfig
from deepvit_train.console import amount
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT


def build_mixup(
    augment: AugmentConfig, label_smoothing: float, num_classes: int, micro_batch: int
) -> Mixup | None:
    """Build timm's mixup and cutmix, or None if both are off. Each batch gets one of them.

    The targets it returns are smoothed. Raises ConfigError if images can't be paired up.
    """
    if not (augment.mixup or augment.cutmix):
        return None
    if micro_batch % 2:
        raise ConfigError(
            f"trainer.batch_size: mixup and cutmix pair up images, but {amount(micro_batch, 'image')} reach "
            f"each forward pass; nearest: {micro_batch + 1} of them, or augment.mixup=0 augment.cutmix=0"
        )
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=label_smoothing, num_classes=num_classes)


def build_ema(
    model: DeepViT, decay: float | None, warmup: bool = True, *, foreach: bool = True
) -> ModelEmaV3 | None:
    """Build the averaged weights, or None if there is no decay.

    Args:
        warmup: let the decay rise at the start; otherwise the first update has the full decay too.
        foreach: update all tensors in one call, which sharded ones do not allow.
    """
    if decay is None:
        return None
    # timm's first update takes the weights as they are, unless it counts from a step before.
    after = 0 if warmup else -1
    return ModelEmaV3(model, decay=decay, use_warmup=warmup, update_after_step=after, foreach=foreach)
