"""The softmax maps of a few images or rows at a time, made the same way whenever they are needed.

Shapes: B batch, N tokens, H heads, K head_dim; in a chunk C images and R rows (queries).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one chunk's maps. On the CPU they should stay in the cache; elsewhere launches should be few.
CPU_CHUNK_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20

# Memory for a chunk's maps on the CPU, kept for the next call: to fill fresh pages takes as long as the sums.
_kept = threading.local()


class Chunks:
    """Goes over the batch in chunks; the same seed gives the same dropout in the forward and backward pass.

    Args:
        q: (B, H, N, K), for its sizes and device.
        full: the type to compute in.
        seed: () int64 on the CPU, where the dropout masks come from; None without dropout.
        dropout: probability of dropping an entry of the maps.
        rows: rows of maps worked on at a time, counted over images; 0: chosen from the sizes.
    """

    def __init__(self, q: Tensor, full: torch.dtype, seed: Tensor | None, dropout: float, rows: int) -> None:
        self.batch, self.heads, self.tokens, head_dim = q.shape
        self.scale = head_dim**-0.5
        self.full = full
        self.device = q.device
        self.keep = 1.0 - dropout
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(q.device).manual_seed(int(seed))
        if not rows:
            budget = CPU_CHUNK_BYTES if q.device.type == "cpu" else CHUNK_BYTES
            rows = budget // max(1, self.heads * self.tokens * full.itemsize)
        self.images = _slices(self.batch, rows // self.tokens)
        self.rows = _slices(self.tokens, rows)

    def load(self, images: slice, *tensors: Tensor) -> Iterator[Tensor]:
        """These images' share of each tensor, contiguous: (B, H, N, K) -> (C, H, N, K)."""
        for each in tensors:
            yield each[images].to(self.full).contiguous()

    def buffers(self, count: int, images: slice, rows: slice) -> list[Tensor]:
        """Uninitialised (C, H, R, N) tensors; those of the last call are overwritten."""
        shape = (images.stop - images.start, self.heads, rows.stop - rows.start, self.tokens)
        size = shape[0] * shape[1] * shape[2] * shape[3]
        kept: Tensor | None = getattr(_kept, str(self.full), None)
        if self.device.type != "cpu":
            memory = torch.empty(count, size, dtype=self.full, device=self.device)
        elif kept is None or kept.numel() < count * size:
            with torch.inference_mode(False):  # else it could not be written to outside inference mode
                memory = torch.empty(count * size, dtype=self.full, device=self.device)
            setattr(_kept, str(self.full), memory)
        else:
            memory = kept
        return [each.view(shape) for each in memory.view(-1)[: count * size].split(size)]

    def softmax_maps(self, q: Tensor, k: Tensor, out: Tensor) -> Tensor:
        """softmax(q k^T) over keys, q scaled already. (C, H, R, K), (C, H, N, K) -> (C, H, R, N)."""
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out=out.flatten(0, 1))
        return torch.softmax(out, -1, out=out)

    def draw_mask(self, out: Tensor) -> Tensor:
        """What dropout multiplies the next chunk's maps by: 0 or 1 / (1 - dropout)."""
        return out.bernoulli_(self.keep, generator=self.generator).mul_(1 / self.keep)


def _slices(total: int, most: int) -> list[slice]:
    """0..total in equal steps, the last one perhaps shorter, of `most` at most and 1 at least."""
    count = -(-total // max(1, most))
    step = -(-total // max(1, count))
    return [slice(start, min(start + step, total)) for start in range(0, total, max(1, step))]
