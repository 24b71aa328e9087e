"""NaN and infinity: noticed without waiting for the device, and traced to where they first appear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepvit_train.config.recipe import Precision
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.world import World
from deepvit_train.error import NotFiniteError
from deepvit_train.models import DeepViT
from deepvit_train.precision import autocast


class FiniteGuard:
    """Remembers the first step whose loss or gradient norm was not finite, without waiting for the device."""

    def __init__(self, world: World, scaled: bool) -> None:
        self.world = world
        self.scaled = scaled  # fp16's loss scaler answers for its gradients itself
        self.first = torch.tensor(-1, device=world.device)
        self.values = torch.zeros(2, device=world.device)

    def observe(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Look at a step before its update. Raises NotFiniteError at once where that waits for nothing."""
        values = torch.stack([loss, grad_norm.to(loss.dtype)])
        finite = values[:1].isfinite().all() if self.scaled else values.isfinite().all()
        hit = ~finite & (self.first < 0)
        self.first = torch.where(hit, step, self.first)
        self.values = torch.where(hit, values, self.values)
        # The gradient, and so this decision, is the same on every rank; the weights are still good.
        if self.world.device.type == "cpu" and not self.scaled and not grad_norm.isfinite():
            self._fail(step)

    def check(self) -> None:
        """Raise NotFiniteError naming the first bad step, on every rank alike. Waits for the device."""
        mine = int(self.first)
        first = self.world.any(mine)
        if first >= 0 > mine:
            raise NotFiniteError(f"step {first}: the loss of another rank is not finite")
        if first >= 0:
            self._fail(mine)

    def _fail(self, step: int) -> None:
        loss, norm = self.values.tolist()
        raise NotFiniteError(f"step {step}: the loss is {loss:g} and the gradient norm {norm:g}")


@torch.no_grad()
def first_non_finite(
    model: DeepViT, batches: Sequence[Batch], world: World, precision: Precision
) -> set[str]:
    """Where NaN or infinity first appears: the images or a part of the model; nowhere in a forward pass.

    On a GPU the step that went wrong has spoilt the weights before it is noticed; then they are named.
    """
    stages = {"patch_embed": model.patch_embed, "norm": model.norm, "head": model.head}
    stages |= {f"blocks.{number}": block for number, block in enumerate(model.blocks)}
    if any(not parameter.isfinite().all() for parameter in model.parameters()):
        return {"the weights themselves, spoilt by the step before"}
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not output.isfinite().all():
            found.append(name)

    hooks = [
        stage.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
        for name, stage in stages.items()
    ]
    try:
        for batch in batches:
            look("the images", batch.images)
            with autocast(world.device, precision):
                model(batch.images)  # all of them, whatever was found: ranks may wait for each other inside
    finally:
        for hook in hooks:
            hook.remove()
    return set(found[:1])
