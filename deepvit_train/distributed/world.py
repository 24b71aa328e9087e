"""The processes of one run: which one this is, and sums over all. One process is the plain case."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from deepvit_train.error import ConfigError


@dataclass(frozen=True)
class World:
    """This process among those of the run, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, on every rank."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, number: int) -> int:
        """The largest of a number over all ranks, so that all decide alike."""
        return self.largest(number)[0]

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks. Goes between the hosts' CPUs: no GPU is waited for."""
        if self.size == 1:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [int(number) for number in largest]

    def union(self, lines: set[str]) -> set[str]:
        """The lines of all ranks, on every rank."""
        if not self.any(len(lines)) or self.size == 1:
            return set(lines)
        gathered: list[set[str]] = [set()] * self.size
        dist.all_gather_object(gathered, lines)
        return set().union(*gathered)

    def first(self, text: str) -> str:
        """What the first rank says, on every rank."""
        said = [text]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def each(self, number: float) -> list[float]:
        """The number of each rank, on every rank."""
        if self.size == 1:
            return [number]
        found = torch.zeros(self.size, dtype=torch.float64)
        found[self.rank] = number
        dist.all_reduce(found)
        return found.tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(0)


def launched_rank() -> int:
    """The rank that torchrun gave this process, or 0; known before torch.distributed starts."""
    return int(os.environ.get("RANK", "0"))


def launched_size() -> int:
    """The number of processes that torchrun started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(device: str) -> torch.device:
    """This process's device for 'auto', 'cpu' or 'cuda'; CUDA kernels go there from now on.

    Raises ConfigError where this machine has no such GPU.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if not found:
        raise ConfigError(f"device={device}: torch finds no CUDA GPU here; nearest: device=cpu")
    if number >= found:
        raise ConfigError(f"torchrun --nproc-per-node: a rank each GPU, {found} here; nearest: {found}")
    chosen = torch.device("cuda", number)
    torch.cuda.set_device(chosen)
    return chosen


def start(device: str, timeout_s: float) -> World:
    """Join the other processes, if torchrun started any.

    Args:
        device: 'auto', 'cpu' or 'cuda'.
        timeout_s: how long to wait for the others before they count as lost.
    """
    chosen = choose_device(device)
    if launched_size() > 1 and not dist.is_initialized():
        # Tensors on a GPU go through NCCL, decisions about the run through gloo.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return World(launched_rank(), launched_size(), chosen)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
