"""What deepvit-train says of a run before its first step: model, data, batches, and what is odd."""

from __future__ import annotations

import torch

from deepvit_train.config.model import ModelConfig
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.layout import layout_warnings
from deepvit_train.distributed.parallel import gathered
from deepvit_train.models.summary import count_flops, count_parameters
from deepvit_train.training.loop import Run
from deepvit_train.training.recipe import describe_groups, is_partial


def summary(run: Run, train: ImageIndex, val: ImageIndex) -> list[str]:
    """Describe the run, in a line for each thing. All ranks must call this."""
    config, plan, world = run.config, run.plan, run.world
    with gathered(run.state.model) as model:
        parameters, flops = count_parameters(model), count_flops(model, config.model.image_size)
    parts = f"{plan.micro_batch} x {config.trainer.accumulate} accumulated x {world.size} ranks"
    lines = [
        _images(config.model),
        f"model: {config.attn.kind}, {config.model.depth} blocks, dim {config.model.dim}, "
        f"{config.model.heads} heads; {parameters:,} parameters, {flops / 1e9:.3f} GFLOPs an image",
        f"learning rate: {describe_groups(run.state.optimizer)} parameters",
        f"data: {len(train):,} training and {len(val):,} validation images in {model.num_classes} classes",
        f"batch: {config.trainer.batch_size} = {parts}; {plan.total_steps:,} steps, "
        f"{plan.steps_per_epoch:,} an epoch; "
        f"{config.trainer.precision} on {world.device}, {torch.get_num_threads()} threads",
    ]
    if not is_partial(config.optim):
        del lines[2]
    warmup, wanted = config.schedule.warmup_within(config.trainer.epochs), config.schedule.warmup_epochs
    if warmup != wanted:
        lines.append(f"warm-up: {warmup:g} epochs, half of the run, because {wanted:g} leave nothing of it")
    limit = config.trainer.limit_batches
    if limit and (images := limit * config.trainer.eval_batch_size * world.size) < len(val):
        lines.append(
            f"evaluations are partial: {images:,} of {len(val):,} images, spread over the classes "
            "(trainer.limit_batches); the best one is chosen among such"
        )
    return lines + [f"warning: {line}" for line in layout_warnings(train)]


def _images(model: ModelConfig) -> str:
    """What an image is to the model: its size and its tokens."""
    side = model.image_size // model.patch_size
    more = "a class token" if not model.registers else f"a class token and {model.registers} registers"
    return (
        f"images: {model.image_size} x {model.image_size} pixels in patches of {model.patch_size}: "
        f"{side**2 + 1 + model.registers} tokens, of which {side} x {side} are patches, and {more}"
    )
