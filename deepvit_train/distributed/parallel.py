"""Models on several ranks: whole on each, or spread over them.

Replicas exchange gradients (DDP). Of a sharded model (FSDP2) each of R ranks keeps 1/R of every parameter,
gradient, average and moment; a block is gathered for its forward and for its backward pass. The functions
here take any module, sharded or not, so that other code need not know which it has.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from deepvit_train.console import amount
from deepvit_train.distributed.world import World
from deepvit_train.error import ConfigError

Model = TypeVar("Model", bound=nn.Module)

NAMED = 3  # names of a list that are shown

# For each sharded model, a copy without shards and without weights.
_structures: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def replicate(model: nn.Module, image_size: int, world: World) -> DistributedDataParallel:
    """Wrap a model so that a backward pass averages its gradients over the ranks.

    DDP regroups the gradients once, after its first backward pass. From three ranks on, another grouping adds
    them up in another order, and a resumed run would differ from one that was never stopped. So one backward
    pass is made here for nothing, on black images of (2, 3, image_size, image_size).

    Raises ConfigError if that pass misses a parameter that is trained: DDP would wait for its gradient.
    """
    device_ids = [world.device] if world.device.type == "cuda" else None
    forward = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    before = [buffer.clone() for buffer in model.buffers()]
    forward(torch.zeros(2, 3, image_size, image_size, device=world.device)).sum().backward()
    if unreached := without_gradient(model):
        raise ConfigError(
            f"no gradient reaches {told_of(unreached)}; several ranks wait for each other's gradients, so "
            "let the loss depend on them, remove them, or train on one rank"
        )
    model.zero_grad()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return forward


def shard(model: nn.Module, blocks: Iterable[nn.Module], world: World) -> None:
    """Spread a model over the ranks, in place, and move it to the world's device.

    Args:
        model: every rank holds it alike.
        blocks: its parts, each gathered on its own. A part may be entered by `forward` or, if it has one, by
            `forward_with_maps`.
    """
    _structures[model] = copy.deepcopy(model).to("meta")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
        if hasattr(block, "forward_with_maps"):
            register_fsdp_forward_method(block, "forward_with_maps")
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model's parameters are spread over the ranks."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: Model) -> Iterator[Model]:
    """Give the model as a checkpoint holds it: whole, with the first rank's buffers.

    All ranks must enter. Inside, each rank may use the model alone or not at all. FSDP2's own modules don't
    allow that: the ranks would gather in different orders from then on, and a backward pass would wait for
    ever. So a sharded model is copied, which takes the memory of its weights, and a change that is made to
    the copy is lost.
    """
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    if not is_sharded(model):
        yield model
        return
    plain = _structures[model]
    plain.load_state_dict(
        {name: whole(value).clone() for name, value in model.state_dict().items()}, assign=True
    )
    try:
        plain.train(model.training)
        yield plain
    finally:
        plain.to("meta")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all its shards, or the tensor itself if it has none.

    All ranks must ask for a sharded tensor, because each sends its part.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def without_gradient(model: nn.Module) -> list[str]:
    """Return the names of the parameters that are trained and have no gradient, after a backward pass.

    A gradient of zeros counts as one, so that nobody waits for the device.
    """
    return [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]


def told_of(names: Sequence[str]) -> str:
    """Return the first names of a list and how many there are: 'a, b, c, ... (12 parameters)'."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} ({amount(len(names), 'parameter')})"


def placed_like(model_tensor: Tensor, tensor: Tensor) -> Tensor:
    """Move a whole tensor to the device of a model's tensor.

    If the model's tensor is sharded and has the same shape, the result is sharded in the same way.
    """
    tensor = tensor.to(model_tensor.device)
    if isinstance(model_tensor, DTensor) and tensor.shape == model_tensor.shape:
        # Each rank has read the whole tensor and takes its part.
        mesh, placements = model_tensor.device_mesh, model_tensor.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return tensor
