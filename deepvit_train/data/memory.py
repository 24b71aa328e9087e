"""Memory for batches that is used again: fresh memory costs a page fault for every 4 KiB of it.

On the CPU that is several times what filling it with a batch costs (docs/log.md).
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; as torch aligns


class ReusedMemory:
    """Hands out tensors; their memory is handed out again once no tensor, view or array refers to it."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._kept: list[np.ndarray] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape) * dtype.itemsize
        block = self._unused(size + ALIGNMENT)
        start = -block.ctypes.data % ALIGNMENT
        # The storage holds the array and the array its block, whose reference count so knows of every view.
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
