"""Make the softmax maps of a few images or rows at a time, the same in the forward and the backward pass.

Keys are padded to a multiple of 8, because products and exponentials of aligned rows are faster. Every map
is 0 at padded keys.

Shapes: B batch, N tokens, P padded tokens, H heads, K head_dim; in a chunk C images and R rows (queries).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of one chunk's maps. On the CPU they should fit in the cache; on a GPU few launches matter more.
CPU_CHUNK_BYTES = 4 << 20
CHUNK_BYTES = 64 << 20
ALIGNMENT = 8
# The logit of a padded key. Its exponential is 0 in float32 too.
NEVER = -1e30

# Memory for a chunk's maps on the CPU, kept for the next call: fresh pages take as long as the arithmetic.
_kept = threading.local()


class Chunks:
    """Cuts a batch into chunks of maps, and makes the maps of each.

    Args:
        q: (B, H, N, K), read for its sizes and device only.
        full: the type to compute in.
        seed: () int64 on the CPU, from which dropout masks are drawn: the same in the forward and the
            backward pass; None without dropout.
        dropout: probability of dropping an entry of the maps.
        rows: rows of maps in a chunk, counted over images; 0: chosen from the sizes.
    """

    def __init__(self, q: Tensor, full: torch.dtype, seed: Tensor | None, dropout: float, rows: int) -> None:
        self.batch, self.heads, self.tokens, head_dim = q.shape
        self.padding = -self.tokens % ALIGNMENT
        self.padded = self.tokens + self.padding
        self.scale = head_dim**-0.5
        self.full = full
        self.device = q.device
        self.keep = 1.0 - dropout
        self.generator = None
        if seed is not None:
            self.generator = torch.Generator(q.device).manual_seed(int(seed))
        if not rows:
            budget = CPU_CHUNK_BYTES if q.device.type == "cpu" else CHUNK_BYTES
            rows = budget // (self.heads * self.padded * full.itemsize)
        self.images = _slices(self.batch, rows // self.tokens)
        self.rows = _slices(self.tokens, rows)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Give the images and the rows of each chunk."""
        return ((images, rows) for images in self.images for rows in self.rows)

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a contiguous tensor of the type to compute in."""
        return tensor.to(self.full).contiguous()

    def over_keys(self, per_head: Tensor) -> Tensor:
        """Repeat a value of each head over keys, with 0 at padded keys. (H,) -> (H, 1, P)."""
        return F.pad(per_head[:, None, None].expand(-1, 1, self.tokens), (0, self.padding))

    def pad(self, tensor: Tensor) -> Tensor:
        """Pad tokens with 0. (B, H, N, K) -> (B, H, P, K)."""
        return F.pad(tensor, (0, 0, 0, self.padding))

    def unpad(self, maps: Tensor) -> Tensor:
        """Return a view of maps without padded keys. (C, H, R, P) -> (C, H, R, N)."""
        return maps[..., : self.tokens]

    def queries(self, q: Tensor, log_sums: Tensor | None = None) -> Tensor:
        """Scale the queries, and add two columns that meet those of `keys`. (B, H, N, K) -> (B, H, N, K + 2).

        queries @ keys.mT are logits in base 2, less log_sums (B, H, N) where they are given.
        """
        queries = F.pad(q.to(self.full) * (self.scale * math.log2(math.e)), (0, 2), value=1.0)
        queries[..., -1] = 0.0 if log_sums is None else -log_sums
        return queries

    def keys(self, k: Tensor) -> Tensor:
        """Pad the keys and add two columns: NEVER at padding, else 0; and ones. -> (B, H, P, K + 2)."""
        keys = F.pad(k.to(self.full), (0, 2, 0, self.padding), value=1.0)
        keys[:, :, : self.tokens, -2] = 0.0
        keys[:, :, self.tokens :, -2] = NEVER
        return keys

    def buffers(self, count: int, images: slice, rows: slice) -> list[Tensor]:
        """Return uninitialised tensors (C, H, R, P). On the CPU they share the memory of the last call's."""
        shape = (images.stop - images.start, self.heads, rows.stop - rows.start, self.padded)
        size = count * math.prod(shape)
        kept: Tensor | None = getattr(_kept, str(self.full), None)
        if self.device.type != "cpu":
            kept = torch.empty(size, dtype=self.full, device=self.device)
        elif kept is None or kept.numel() < size:
            with torch.inference_mode(False):  # memory made in inference mode can't be written outside it
                kept = torch.empty(size, dtype=self.full, device=self.device)
            setattr(_kept, str(self.full), kept)
        return list(kept[:size].view(count, *shape))

    def first_maps(self, queries: Tensor, keys: Tensor, out: Tensor) -> Tensor:
        """Write the softmax over keys to out (C, H, R, P). Returns the log2 of each row's sum, (C, H, R)."""
        product(queries, keys.mT, out)
        most = out.amax(-1, keepdim=True)
        total = out.sub_(most).exp2_().sum(-1, keepdim=True)
        out.mul_(total.reciprocal())
        return total.log2_().add_(most)[..., 0]

    def same_maps(self, queries: Tensor, keys: Tensor, out: Tensor) -> None:
        """Write the same maps again, from queries that were made with `log_sums`."""
        product(queries, keys.mT, out)
        out.exp2_()

    def draw_mask(self, out: Tensor) -> Tensor:
        """Draw the dropout mask of the next chunk into out: each entry is 0 or 1 / (1 - dropout)."""
        return out.bernoulli_(self.keep, generator=self.generator).mul_(1 / self.keep)


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Compute out = left @ right for each image and head."""
    torch.bmm(left.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))


def free_kept_memory() -> None:
    """Free the memory that this thread keeps for its next call."""
    _kept.__dict__.clear()


def _slices(total: int, most: int) -> list[slice]:
    """Cut 0..total into slices of one length, at most `most` and at least 1. The last may be shorter."""
    count = -(-total // max(1, most))
    step = max(1, -(-total // max(1, count)))
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
