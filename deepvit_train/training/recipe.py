"""The recipe: optimizer, schedule, mixing of images, averaged weights. Thin builders over timm and torch."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from deepvit_train.config.data import AugmentConfig
from deepvit_train.config.recipe import OptimConfig, ScheduleConfig
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT


def build_optimizer(model: DeepViT, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW. Weight decay leaves out one-dimensional parameters, the position and the class token.

    With layer decay, a block's learning rate is `layer_decay` times that of the block after it; the head has
    the full rate, stem and tokens the lowest (timm's groups).
    """
    exempt = model.no_weight_decay()
    if not optim.decay_theta:
        exempt |= {name for name, _ in model.named_parameters() if name.endswith("theta")}
    groups: Any
    if optim.layer_decay == 1.0:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, optim.weight_decay, exempt, layer_decay=optim.layer_decay)
    return create_optimizer_v2(
        groups, opt=optim.name.value, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, fused=True
    )


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The highest rate among the groups: the schedule's, wherever the classifier is trained."""
    return max(group["lr"] for group in optimizer.param_groups)


def is_partial(optim: OptimConfig) -> bool:
    """Whether some parameters learn slower than others, or not at all."""
    return optim.layer_decay != 1.0 or optim.freeze_blocks > 0 or optim.head_only


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """What each share of the learning rate is for: 'x1 for 650 parameters, x0.75 for 12,345'."""
    counts: dict[float, int] = {}
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        counts[scale] = counts.get(scale, 0) + sum(parameter.numel() for parameter in group["params"])
    return ", ".join(f"x{scale:.3g} for {counts[scale]:,}" for scale in sorted(counts, reverse=True))


def build_schedule(
    optimizer: torch.optim.Optimizer, schedule: ScheduleConfig, epochs: int, steps_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up, then a cosine over `epochs`, then min_lr; a function of the optimizer step alone."""
    return CosineLRScheduler(
        optimizer,
        t_initial=epochs * steps_per_epoch,
        lr_min=schedule.min_lr,
        warmup_t=round(schedule.warmup_epochs * steps_per_epoch),
        warmup_lr_init=schedule.warmup_lr,
        t_in_epochs=False,
    )


def build_mixup(
    augment: AugmentConfig, label_smoothing: float, num_classes: int, micro_batch: int
) -> Mixup | None:
    """timm's mixup and cutmix, one of both a batch, or None where both are off. Its targets are smoothed."""
    if not (augment.mixup or augment.cutmix):
        return None
    if micro_batch % 2:
        raise ConfigError(
            f"trainer.batch_size: mixup and cutmix pair up images, but {micro_batch} images reach each "
            f"forward pass; nearest: {micro_batch + 1} of them, or augment.mixup=0 augment.cutmix=0"
        )
    return Mixup(augment.mixup, augment.cutmix, label_smoothing=label_smoothing, num_classes=num_classes)


def build_ema(model: DeepViT, decay: float | None, *, foreach: bool = True) -> ModelEmaV3 | None:
    """Averaged weights, whose decay warms up, or None. `foreach`: all tensors in one call; not if sharded."""
    return None if decay is None else ModelEmaV3(model, decay=decay, use_warmup=True, foreach=foreach)
