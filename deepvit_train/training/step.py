"""One optimizer step. It takes plain arguments and no configuration of a command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from deepvit_train.collapse.gradient import query_key_ratio
from deepvit_train.config.recipe import Precision
from deepvit_train.console import amount
from deepvit_train.data.dataset import Batch
from deepvit_train.determinism import derive_seed, seeded
from deepvit_train.distributed.parallel import whole, without_gradient
from deepvit_train.distributed.world import World
from deepvit_train.error import NotFiniteError
from deepvit_train.precision import autocast
from deepvit_train.training.distillation import Distillation
from deepvit_train.training.finite import FiniteGuard
from deepvit_train.training.loss import Criterion
from deepvit_train.training.regulariser import CosineRegulariser
from deepvit_train.training.state import TrainState


@dataclass(frozen=True)
class StepOptions:
    """What an optimizer step needs besides the state and the images."""

    seed: int
    precision: Precision
    label_smoothing: float
    mixup: Mixup | None
    clip_grad: float | None
    max_scaler_skips: int
    regulariser: CosineRegulariser | None = None
    criterion: Criterion | None = None  # None: cross-entropy
    distillation: Distillation | None = None
    channels_last: bool = False

    @property
    def separated(self) -> bool:
        """Whether the loss is more than the cross-entropy, so that an evaluation's is another quantity."""
        others = (self.regulariser, self.criterion, self.distillation)
        return self.label_smoothing > 0 or any(each is not None for each in others)


@dataclass(frozen=True)
class StepResult:
    """What a step found. All of it stays on the device.

    Args:
        loss: mean over this rank's images.
        grad_norm: norm of the gradient, before it is clipped.
        penalty: the regulariser's part of the loss.
        distillation: what the model misses of its teacher's answers.
        cross_entropy: plain, without label smoothing, weights, penalty and teacher; the loss itself if it is
            that.
        query_key: what `query_key_ratio` says of the gradient, if that was asked for.
        unreached: the parameters that are trained and got no gradient, if that was asked for.
    """

    loss: Tensor
    grad_norm: Tensor
    penalty: Tensor
    distillation: Tensor
    cross_entropy: Tensor
    query_key: Tensor | None = None
    unreached: tuple[str, ...] = ()


def train_step(
    state: TrainState,
    forward: Callable[..., Any],
    batches: Sequence[Batch],
    world: World,
    options: StepOptions,
    guard: FiniteGuard,
    look_at_gradients: bool = False,
    name_unreached: bool = False,
) -> StepResult:
    """Advance the state by one optimizer step over the micro-batches. Raises NotFiniteError.

    Dropout and stochastic depth draw from (seed, step, rank), so a resumed run needs no generator's state.

    Args:
        forward: the model as it is trained, perhaps compiled or wrapped for several ranks.
        batches: micro-batches, on the device.
        look_at_gradients: compare the gradients of queries and keys with those of values.
        name_unreached: find the parameters that no gradient reaches.
    """
    torch.manual_seed(derive_seed("step", options.seed, state.step, world.rank))
    state.schedule.step_update(state.step)
    loss, penalty, missed, plain = torch.zeros(4, device=world.device)
    # All micro-batches of all ranks draw the same: a step mixes its images as one batch would (TrainOrder).
    seed = derive_seed("mixup", options.seed, state.step, 0, 0)
    for number, batch in enumerate(batches):
        images, targets, smoothing = _mixed(batch, options, seed)
        # Replicas exchange gradients once a step, after its last micro-batch; sharded ranks after each.
        local: Any = getattr(forward, "no_sync", nullcontext) if number + 1 < len(batches) else nullcontext
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        # Before the model's activations take memory.
        answer = None if options.distillation is None else options.distillation.answer(images)
        with local():
            with autocast(world.device, options.precision):
                logits, micro_penalty = _regularised(forward, images, options.regulariser)
            criterion = options.criterion or _plain
            task_loss = criterion(logits.float(), targets, smoothing)
            if answer is not None and (distillation := options.distillation) is not None:
                micro_missed = distillation.loss(logits.float(), answer)
                missed += micro_missed.detach() / len(batches)
                task_loss = (1 - distillation.share) * task_loss + distillation.share * micro_missed
            micro_loss = (task_loss + micro_penalty) / len(batches)
            state.scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
        penalty += micro_penalty.detach() / len(batches)
        if options.separated:
            plain += _cross_entropy(logits.detach(), targets, options.label_smoothing) / len(batches)
    state.scaler.unscale_(state.optimizer)
    parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
    grad_norm = whole(
        torch.nn.utils.get_total_norm([grad for each in parameters if (grad := each.grad) is not None])
    )
    guard.observe(state.step + 1, loss, grad_norm)
    query_key = query_key_ratio(state.model) if look_at_gradients else None
    unreached = tuple(without_gradient(state.model)) if name_unreached else ()
    if options.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, options.clip_grad, grad_norm)
    _update(state, options)
    plain = plain if options.separated else loss
    return StepResult(loss, grad_norm, penalty, missed, plain, query_key, unreached)


def _plain(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=smoothing)


def _mixed(batch: Batch, options: StepOptions, seed: int) -> tuple[Tensor, Tensor, float]:
    """Mix the images and targets of a batch, if that is asked for. Returns the label smoothing as well."""
    if options.mixup is None:
        return batch.images, batch.targets, options.label_smoothing
    with seeded(seed):
        images, targets = options.mixup(batch.images, batch.targets)
    return images, targets, 0.0  # mixed targets are smoothed already


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the mean cross-entropy with targets that are not smoothed.

    Args:
        logits: (B, C).
        targets: (B,), classes, or (B, C), mixed and smoothed.
    """
    if targets.is_floating_point():
        targets = (targets - smoothing / targets.shape[1]) / (1 - smoothing)
    return F.cross_entropy(logits.float(), targets)


def _regularised(
    forward: Callable[..., Any], images: Tensor, regulariser: CosineRegulariser | None
) -> tuple[Tensor, Tensor]:
    """Return the logits and the penalty on the attention maps, which is 0 without a regulariser."""
    if regulariser is None:
        return forward(images), images.new_zeros(())
    logits, maps = forward(images, map_blocks=regulariser.blocks)
    return logits, regulariser(maps)


def _update(state: TrainState, options: StepOptions) -> None:
    """Update the weights, unless fp16's scaler found an overflow, and then the averaged weights."""
    scale = state.scaler.get_scale()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if state.scaler.is_enabled():
        state.scaler_skips = state.scaler_skips + 1 if state.scaler.get_scale() < scale else 0
        if state.scaler_skips > options.max_scaler_skips:
            raise NotFiniteError(
                f"step {state.step}: gradients overflowed fp16 in {amount(state.scaler_skips, 'step')} in a "
                f"row (trainer.max_scaler_skips={options.max_scaler_skips}, loss scale "
                f"{state.scaler.get_scale():g}); "
                "try trainer.precision=bf16 or a lower optim.lr"
            )
    if state.ema is not None:
        state.ema.update(state.model, step=state.step)
