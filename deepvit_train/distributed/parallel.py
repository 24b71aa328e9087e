"""Models on several ranks: whole on each, or spread over them.

Replicas exchange gradients (DDP). Of a sharded model (FSDP2) each of R ranks keeps 1/R of every parameter,
gradient, average and moment; a block is gathered for its forward and for its backward pass. The functions
here take models and tensors that are sharded or not, so that other code need not know which.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from deepvit_train.distributed.world import World
from deepvit_train.models import DeepViT

# Each sharded model without shards and without weights.
_structures: WeakKeyDictionary[nn.Module, DeepViT] = WeakKeyDictionary()


def replicate(model: DeepViT, image_size: int, world: World) -> DistributedDataParallel:
    """The model with gradients averaged over ranks, grouped for that as they will be in every step.

    DDP regroups gradients once, after its first backward pass. From three ranks on, the first step of each
    start would add them up in another order than the run that was never stopped: so that pass is for nothing.
    """
    device_ids = [world.device] if world.device.type == "cuda" else None
    forward = DistributedDataParallel(model, device_ids, gradient_as_bucket_view=True)
    before = [buffer.clone() for buffer in model.buffers()]
    forward(torch.zeros(2, 3, image_size, image_size, device=world.device)).sum().backward()
    model.zero_grad()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    return forward


def shard(model: DeepViT, world: World) -> None:
    """Spread a model, which every rank holds alike, over the ranks: in place, and onto the world's device."""
    _structures[model] = copy.deepcopy(model).to("meta")
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "forward_with_maps")
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are spread over ranks."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: DeepViT) -> Iterator[DeepViT]:
    """The model with the first rank's buffers, as a checkpoint holds it; a sharded one whole on every rank.

    All ranks enter; inside, each may use it alone or not at all. That FSDP2's own modules do not allow: their
    order of gathering would differ from then on, and a backward pass would wait for ever. So a sharded model
    is copied, which takes the memory of the weights; what is changed inside is lost.
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
    """A tensor with all its shards; itself if it has none. Every rank asks for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(model_tensor: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor on the device of a model's, and spread over the ranks if that one of its shape is."""
    tensor = tensor.to(model_tensor.device)
    if isinstance(model_tensor, DTensor) and tensor.shape == model_tensor.shape:
        # Each rank has read the whole tensor and takes its part.
        mesh, placements = model_tensor.device_mesh, model_tensor.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    return tensor
