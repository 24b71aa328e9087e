"""Reuse memory for batches, because fresh memory costs a page fault for every 4 KiB of it.

On the CPU the page faults take several times as long as filling the memory with a batch (docs/log.md).
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch aligns its tensors


class ReusedMemory:
    """Gives out tensors, and reuses their memory once no tensor, view or array refers to it.

    Args:
        blocks: how many pieces of memory to keep.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._kept: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        block = self._unused(size + ALIGNMENT)
        start = -block.ctypes.data % ALIGNMENT
        # The tensor's storage refers to the array, and the array to its block. So the block's reference count
        # tells whether any view is left.
        return torch.from_numpy(block[start : start + size]).view(dtype).view(shape)

    def _unused(self, size: int) -> np.ndarray:
        for place in range(len(self._kept)):
            if self._kept[place].nbytes >= size and _references(self._kept, place) == _UNUSED:
                return self._kept[place]
        block = np.empty(size, np.uint8)
        self._kept = [*self._kept, block][-self.blocks :]
        return block


def _references(blocks: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(blocks[place])


_UNUSED = _references([np.empty(1)], 0)
