"""Share memory that loader processes fill and the main process reads, again and again.

Fresh shared memory would cost a page fault for every 4 KiB of every batch, which is a tenth of a loader's
time. It would also take room in /dev/shm, of which a container has 64 MB. So this memory is allocated once,
before the loader processes are forked, and they inherit it.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_known: weakref.WeakValueDictionary[int, SharedBlocks] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class SharedBlocks:
    """Blocks of bytes in shared memory, of which each loader process has its own.

    Args:
        workers: number of loader processes.
        blocks: blocks of each process.
        size: bytes of a block.
    """

    def __init__(self, workers: int, blocks: int, size: int) -> None:
        self._memory = mmap.mmap(-1, workers * blocks * size)
        self._bytes = np.frombuffer(self._memory, np.uint8).reshape(workers, blocks, size)
        self._taken = np.frombuffer(mmap.mmap(-1, workers * blocks), np.uint8).reshape(workers, blocks)
        self._process = os.getpid()
        self.number = next(_numbers)
        _known[self.number] = self

    def take(self, worker: int, shape: tuple[int, ...]) -> Block | None:
        """Return a free uint8 block of a loader process, or None if no block is free or large enough."""
        free = (self._taken[worker] == 0).nonzero()[0]
        if not len(free) or math.prod(shape) > self._bytes.shape[2]:
            return None
        self._taken[worker, free[0]] = 1
        return Block(self, worker, int(free[0]), shape)

    def view(self, worker: int, block: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return the bytes of a block."""
        return self._bytes[worker, block, : math.prod(shape)].reshape(shape)

    def receive(self, worker: int, block: int, shape: tuple[int, ...]) -> Tensor:
        """Return a filled block. It is free again once no tensor, view or array refers to it."""
        view = self._bytes[worker, block, : math.prod(shape)]
        weakref.finalize(view, self._free, worker, block).atexit = False
        return torch.from_numpy(view).view(shape)

    def give_back(self) -> None:
        """Return the memory to the system until it is filled again, unless somebody still reads it."""
        if not self._taken.any():
            self._memory.madvise(mmap.MADV_REMOVE)

    def _free(self, worker: int, block: int) -> None:
        # A loader process that was forked while somebody was reading has a copy of the view. When that copy
        # goes, nothing must be freed.
        if os.getpid() == self._process:
            self._taken[worker, block] = 0


class Block:
    """A block that a loader process fills. Sending it sends its place only, and a tensor arrives."""

    def __init__(self, blocks: SharedBlocks, worker: int, number: int, shape: tuple[int, ...]) -> None:
        self.pixels = torch.from_numpy(blocks.view(worker, number, shape))
        self._place = blocks.number, worker, number, shape

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[int, int, int, tuple[int, ...]]]:
        return _receive, self._place


def _receive(blocks: int, worker: int, number: int, shape: tuple[int, ...]) -> Tensor:
    return _known[blocks].receive(worker, number, shape)
