"""What deepvit-train says of a run before its first step: model, data, batches, and what is odd."""

from __future__ import annotations

import numpy as np
import torch

from deepvit_train.config.data import Balance
from deepvit_train.config.model import ModelConfig
from deepvit_train.config.schedule import ScheduleName
from deepvit_train.console import amount
from deepvit_train.data.balance import samples_a_class
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.layout import layout_warnings
from deepvit_train.distributed.parallel import gathered
from deepvit_train.models.summary import count_flops, count_parameters
from deepvit_train.training.class_weight import describe_weights
from deepvit_train.training.optimizer import describe_groups, describe_muon, is_partial
from deepvit_train.training.run import Run


def summary(run: Run, train: ImageIndex, val: ImageIndex) -> list[str]:
    """Describe the run, in a line for each thing. All ranks must call this."""
    config, plan, world = run.config, run.plan, run.world
    with gathered(run.state.model) as model:
        parameters, flops = count_parameters(model), count_flops(model, config.model.image_size)
    parts = f"{plan.micro_batch} x {config.trainer.parts} accumulated x {amount(world.size, 'rank')}"
    lines = [
        _images(config.model),
        f"model: {config.attn.kind}, {amount(config.model.depth, 'block')}, dim {config.model.dim}, "
        f"{amount(config.model.heads, 'head')}; {parameters:,} parameters, {flops / 1e9:.3f} GFLOPs an image",
        f"learning rate: {describe_groups(run.state.optimizer)} parameters",
        f"data: {len(train):,} training and {amount(len(val), 'validation image')} in "
        f"{amount(model.num_classes, 'class', 'classes')}",
        f"batch: {config.trainer.batch_size} = {parts}; {amount(plan.total_steps, 'step')}, "
        f"{plan.steps_per_epoch:,} an epoch; "
        f"{config.trainer.precision} on {world.device}, {amount(torch.get_num_threads(), 'thread')}",
    ]
    if not is_partial(config.optim):
        del lines[2]
    if config.data.balance != Balance.none:
        lines.append(_balance(train, config.data.balance))
    if (line := describe_muon(run.state.optimizer)) is not None:
        lines.append(line)
    if (weights := run.state.class_weights) is not None:
        lines.append(describe_weights(weights, train.classes, config.loss.class_weight))
    if config.optim.is_schedule_free and config.schedule.name != ScheduleName.constant:
        lines.append(f"warning: {config.optim.name} is made for schedule=constant")
    warmup, wanted = config.schedule.warmup_within(config.trainer.epochs), config.schedule.warmup_epochs
    if config.schedule.warmup_share is None and warmup != wanted:
        lines.append(
            f"warm-up: {amount(warmup, 'epoch')}, half of the run, because {wanted:g} leave nothing of it"
        )
    limit = config.trainer.limit_batches
    if limit and (images := limit * config.trainer.eval_batch_size * world.size) < len(val):
        lines.append(
            f"evaluations are partial: {images:,} of {len(val):,} images, spread over the classes "
            "(trainer.limit_batches); the best one is chosen among such"
        )
    return lines + [f"warning: {line}" for line in layout_warnings(train)]


def _balance(train: ImageIndex, balance: Balance) -> str:
    """What balance changes: how often an epoch shows the images of the largest class, and of the smallest."""
    counts, samples = np.bincount(train.targets), samples_a_class(train.targets, balance)
    sizes = np.where(counts > 0, counts, counts.max())
    told = [
        f"{train.classes[number]} has {amount(int(counts[number]), 'image')}, each shown "
        f"{samples[number] / counts[number]:.3g} x an epoch"
        for number in (int(counts.argmax()), int(sizes.argmin()))
    ]
    return f"balance: {balance}; {'; '.join(told)}"


def _images(model: ModelConfig) -> str:
    """What an image is to the model: its size and its tokens."""
    side = model.image_size // model.patch_size
    others = ["a class token"] * model.class_token
    if model.registers:
        others.append(amount(model.registers, "register"))
    more = f", and {' and '.join(others)}" if others else ""
    return (
        f"images: {model.image_size} x {model.image_size} pixels in patches of {model.patch_size}: "
        f"{side**2 + model.class_token + model.registers} tokens, of which {side} x {side} are patches{more}"
    )
