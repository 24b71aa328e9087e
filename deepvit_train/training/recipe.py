"""Builds optimizer, schedule, mixing of images and averaged weights, from timm and torch."""

from __future__ import annotations

import re
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from deepvit_train.config.data import AugmentConfig
from deepvit_train.config.recipe import OptimConfig, ScheduleConfig
from deepvit_train.console import amount
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT

# What mixes the heads of a block: Theta, talking heads' second matrix, their biases, and the norm.
MIXING = re.compile(r"\.attn\.(theta|logit_|norm\.)")


def build_optimizer(model: DeepViT, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build AdamW. One-dimensional parameters, the positions and the class token get no weight decay.

    With layer decay, a block's learning rate is `layer_decay` times that of the block after it. The head has
    the full rate, and the stem and the tokens have the lowest (timm's groups).
    """
    exempt = model.no_weight_decay()
    if not optim.decay_theta:
        exempt |= {name for name, _ in model.named_parameters() if name.endswith("theta")}
    groups: Any
    if optim.layer_decay == 1.0:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, optim.weight_decay, exempt, layer_decay=optim.layer_decay)
    if optim.mixing_rate != 1.0:
        groups = with_mixing_rate(groups, model, optim.mixing_rate)
    return create_optimizer_v2(
        groups, opt=optim.name.value, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True
    )


def with_mixing_rate(groups: list[dict[str, Any]], model: DeepViT, rate: float) -> list[dict[str, Any]]:
    """Part each group of parameters in two: what mixes heads learns at so many times the group's rate."""
    mixing = {id(parameter) for name, parameter in model.named_parameters() if MIXING.search(name)}
    parted = []
    for group in groups:
        rest = [each for each in group["params"] if id(each) not in mixing]
        found = [each for each in group["params"] if id(each) in mixing]
        parted += [group | {"params": rest}] if rest else []
        parted += [group | {"params": found, "lr_scale": group.get("lr_scale", 1.0) * rate}] if found else []
    return parted


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the schedule's learning rate, which the classifier has."""
    return max(group["lr"] for group in optimizer.param_groups if group.get("lr_scale", 1.0) == 1.0)


def is_partial(optim: OptimConfig) -> bool:
    """Return whether some parameters learn at another rate than others, or not at all."""
    return optim.layer_decay != 1.0 or optim.mixing_rate != 1.0 or optim.freeze_blocks > 0 or optim.head_only


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """Return how many parameters have which share of the learning rate: 'x1 for 650, x0.75 for 12,345'."""
    counts: dict[float, int] = {}
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        counts[scale] = counts.get(scale, 0) + sum(parameter.numel() for parameter in group["params"])
    return ", ".join(f"x{scale:.3g} for {counts[scale]:,}" for scale in sorted(counts, reverse=True))


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, epochs: int, steps_per_epoch: int
) -> CosineLRScheduler:
    """Build the schedule by optimizer step: a linear warm-up, then a cosine over `epochs`, then min_lr."""
    return CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps_per_epoch,
        lr_min=schedule.min_lr,
        warmup_t=round(schedule.warmup_within(epochs) * steps_per_epoch),
        warmup_lr_init=schedule.warmup_lr,
        t_in_epochs=False,
    )


def learning_rate_after(schedule: CosineLRScheduler, steps: int) -> float:
    """Return the highest learning rate of all groups in the step that follows so many steps."""
    return max(schedule._get_lr(steps))


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
