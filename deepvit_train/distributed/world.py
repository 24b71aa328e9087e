"""The processes of a run: which of them this is, and what they tell each other. Often there is just one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from deepvit_train.distributed.launch import Launch, local_rank, read_launch
from deepvit_train.error import ConfigError, UserError

Content = TypeVar("Content")

# Where ranks meet, by address, and how often they have met there: a sweep meets anew for each of its runs.
_meetings: dict[str, tuple[dist.Store, int]] = {}


@dataclass(frozen=True)
class World:
    """This process among those of the run, and its device. All ranks must call the same methods together."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks. The tensor is changed in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, number: int) -> int:
        """Return the largest of all ranks' numbers, so that all ranks decide alike."""
        return self.largest(number)[0]

    def largest(self, *numbers: int) -> list[int]:
        """Return the largest of all ranks' numbers, place by place. No GPU is waited for."""
        if self.size == 1:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return [int(number) for number in largest]

    def union(self, lines: set[str]) -> set[str]:
        """Return the lines of all ranks."""
        if not self.any(len(lines)) or self.size == 1:
            return set(lines)
        return set().union(*self.gather(lines))

    def gather(self, content: Any) -> list[Any]:
        """Return what each rank gave, in the order of ranks. It is pickled on the way."""
        if self.size == 1:
            return [content]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, content)
        return gathered

    def equal(self, digest: bytes) -> bool:
        """Return whether all ranks gave the same bytes. They must be equally long."""
        if self.size == 1:
            return True
        mine = torch.tensor(list(digest), dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return all(each.equal(mine) for each in every)

    def first(self, content: Content) -> Content:
        """Return what the first rank gave. It is pickled on the way."""
        said = [content]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def each(self, number: float) -> list[float]:
        """Return the number of each rank, in the order of ranks."""
        if self.size == 1:
            return [number]
        found = torch.zeros(self.size, dtype=torch.float64)
        found[self.rank] = number
        dist.all_reduce(found)
        return found.tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(0)


def choose_device(device: str) -> torch.device:
    """Return this process's device for 'auto', 'cpu' or 'cuda'. CUDA kernels go there from now on.

    Raises ConfigError if this machine has no such GPU.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    check_device(device)
    number, found = local_rank(), torch.cuda.device_count()
    if number >= found:
        raise ConfigError(f"torchrun --nproc-per-node: a rank each GPU, {found} here; nearest: {found}")
    chosen = torch.device("cuda", number)
    torch.cuda.set_device(chosen)
    return chosen


def check_device(device: str, key: str = "device") -> None:
    """Raise ConfigError, which names the key, for 'cuda' on a machine without a GPU."""
    if device == "cuda" and not torch.cuda.device_count():
        raise ConfigError(f"{key}={device}: torch finds no CUDA GPU here; nearest: {key}=cpu")


def start(device: str, timeout_s: float) -> World:
    """Join the other processes, if torchrun started any.

    Args:
        device: 'auto', 'cpu' or 'cuda'.
        timeout_s: seconds to wait for the others before they count as lost.

    Raises ConfigError for an environment that no launcher made, UserError where the others do not come.
    """
    launch = read_launch()
    chosen = choose_device(device)
    if launch.size > 1 and not dist.is_initialized():
        # Tensors on a GPU go through NCCL, decisions about the run through gloo.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        _join(backend, launch, timedelta(seconds=timeout_s))
    return World(launch.rank, launch.size, chosen)


def _join(backend: str, launch: Launch, timeout: timedelta) -> None:
    """Meet the other ranks. Each meeting has keys of its own, so that a former one is not taken for it."""
    address = f"{launch.host}:{launch.port}"
    try:
        if address not in _meetings:
            launch.wait_for_host(timeout.total_seconds())
            _meetings[address] = next(rendezvous("env://", timeout=timeout))[0], 0
        store, times = _meetings[address]
        _meetings[address] = store, times + 1
        own = dist.PrefixStore(f"meeting{times}", store)
        dist.init_process_group(backend, store=own, rank=launch.rank, world_size=launch.size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"rank {launch.rank} of {launch.size} did not meet the others at {address} ({reason})\n"
            "torchrun starts all ranks with one WORLD_SIZE, MASTER_ADDR and MASTER_PORT (docs/cluster.md)"
        ) from None


def stop() -> None:
    """Leave the other processes. Does nothing if there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()
