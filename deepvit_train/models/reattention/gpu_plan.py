"""How the GPU kernels of re-attention are launched for inputs of one shape: chunks, tiles, constants.

Shapes: B batch, N tokens, P padded tokens, H heads, HP padded heads, W width of a head, D that widened to
whole units of alignment, DP to a power of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Bytes of one chunk's maps: launches are few, and the memory is small beside that of a training step.
CHUNK_BYTES = 128 << 20
# Triton sees that rows are aligned, and so moves 16 bytes at a time, for multiples of 16 entries only.
ALIGNMENT = 16
LONGEST_ROW = 256  # tokens of a row of maps that a program holds in registers; longer rows it makes twice

Constants = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """What decides the code of the kernels. biased: M has a bias; dropout: maps are dropped."""

    norm: str
    biased: bool
    dropout: bool


@lru_cache(maxsize=256)
def plan_for(shape: tuple[int, int, int, int], dtype: torch.dtype, kind: Kind, rows: int) -> Plan:
    """The plan for q of a shape (B, H, N, W); made once, because making it takes as long as a launch.

    rows: of the maps of a chunk, counted over images; 0: chosen from the sizes.
    """
    return Plan(shape, dtype, kind, rows)


class Plan:
    """Sizes, and for each kernel the constants that it is compiled with."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, kind: Kind, rows: int) -> None:
        self.batch, self.heads, self.tokens, self.width = shape
        # Narrow rows fit into registers even if they are not aligned.
        self.head_dim = self.width if self.width <= 32 else _ceil(self.width, ALIGNMENT) * ALIGNMENT
        self.dtype, self.kind = dtype, kind
        self.over_batch = kind.norm in ("batch", "ranks")
        self.padded = _ceil(self.tokens, ALIGNMENT) * ALIGNMENT
        self.padded_heads = max(16, _power_of_two(self.heads))
        # Maps are kept times a power of two near N (gpu_part.py): `level` is 1/N there, `unit` undoes it.
        self.scale = float(_power_of_two(self.tokens))
        self.level, self.unit = self.scale / self.tokens, 1 / self.scale
        if kind.dropout:
            # A dropped entry is 0 - level. A level that the type holds exactly saves it from being rounded.
            self.level = torch.tensor(self.level, dtype=dtype).item()
        self.uniform = self.level * self.unit
        self.logit_scale, self.exponent_scale = self.width**-0.5, self.width**-0.5 * math.log2(math.e)
        image_bytes = self.heads * self.tokens * self.padded * dtype.itemsize
        images = max(1, rows // self.tokens if rows else CHUNK_BYTES // image_bytes)
        self.chunks = [slice(i, min(i + images, self.batch)) for i in range(0, self.batch, images)]
        # What Triton compiled, ready to be launched, by what it depends on (gpu_call.py).
        self.launches: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
        self._choose_tiles()
        self.mix_programs = _ceil(self.tokens * self.padded, self.mix["COLUMNS"] * self.mix["STEPS"])
        self.unmix_programs = _ceil(self.tokens, self.unmix["ROWS"])

    def tiles(self, constants: Constants) -> int:
        """How many programs share the tokens of a head, in a kernel with these constants."""
        return _ceil(self.tokens, constants["ROWS"])

    def _choose_tiles(self) -> None:
        """Tiles by what was fastest on an H200 (docs/records), smaller where registers would not do.

        Those of heads wider than 64 were chosen by their registers alone.
        """
        single = self.dtype == torch.float32
        wide, very_wide = self.head_dim > 32, self.head_dim > 64
        crowded = self.padded_heads // 16  # 2 for more than 16 heads: a tile of all heads is twice as high
        padded_head_dim = max(16, _power_of_two(self.head_dim))
        of_head: Constants = {"H": self.heads, "D": self.head_dim, "DP": padded_head_dim}
        norm = {"none": 0, "batch": 1, "ranks": 1, "layer": 2}[self.kind.norm]
        of_heads: Constants = {"H": self.heads, "HP": self.padded_heads, "NORM": norm}
        biased, dropout = {"BIASED": self.kind.biased}, {"DROPOUT": self.kind.dropout}
        row = max(16, _power_of_two(self.padded))

        tile = _tile(32, 16 if very_wide else min(row, 32)) if single else _tile(64, min(row, 32), stages=4)
        self.maps: Constants = of_head | tile | {"ONCE": tile["COLUMNS"] >= self.padded}
        self.mix: Constants = of_heads | biased | dropout
        self.mix |= {"COLUMNS": (256 if single else 512) // crowded, "STEPS": 8, "num_warps": 4}
        self.affine: Constants = of_heads | biased | dropout | {"ROWS": 256, "num_warps": 8}
        self.values: Constants = of_head | {"HP": self.padded_heads}
        if single:
            self.values |= _tile(32, 32)
        elif wide:
            self.values |= _tile(64, 64, warps=8 if very_wide else 4, stages=3)
        else:
            self.values |= _tile(128, 128)

        self.sums: Constants = of_head | {"ROWS": min(128, 4096 // padded_head_dim)}
        self.coefficients: Constants = of_heads | biased | {"ROWS": 64}
        tile = _tile(32, 16 if very_wide else 32) if single else _tile(64, 64, stages=2 if very_wide else 3)
        self.remap: Constants = of_head | tile
        self.remap["CENTRED"] = self.kind.norm != "layer" and not self.kind.dropout
        longest = LONGEST_ROW // (4 if single else 1) // crowded
        columns = row if row <= longest else longest // 2
        self.unmix: Constants = of_heads | dropout | {"ONCE": columns >= self.padded}
        many = crowded > 1 or (self.kind.dropout and not single)
        self.unmix |= _tile(8, columns, warps=8 if many else 4)
        self.unmix |= {"SLICES": min(4, columns // 16)}
        self.gradients: Constants = of_head | {"HP": self.padded_heads}
        if single:
            self.gradients |= _tile(32, 32, warps=8 if very_wide else 4)
        elif very_wide:
            self.gradients |= _tile(64, 32, warps=8)
        else:
            self.gradients |= _tile(64 if wide else 128, 32, stages=3)
        self.totals: Constants = of_heads | dropout | {"ROWS": 512, "num_warps": 16}


def _tile(rows: int, columns: int, *, warps: int = 4, stages: int = 2) -> Constants:
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps, "num_stages": stages}


def _ceil(number: int, unit: int) -> int:
    """How many units hold the number."""
    return -(-number // unit)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()
