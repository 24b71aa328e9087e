"""The GPU kernels of re-attention compiled for cards that are not here: they fit, and keep to registers."""

from __future__ import annotations

import pytest
import torch

# Older compilers spill a register or two where this one spills none.
pytest.importorskip("triton", "3.8", reason="CPU builds of torch bring no Triton")

from deepvit_train.models.reattention import gpu, gpu_call
from deepvit_train.models.reattention.norm import Mixing
from tests.models.reattention.ahead_of_time import Launch

REGISTERS = 65536  # of a streaming multiprocessor
# KiB of shared memory that a program may have, by compute capability: A100, RTX 4090 and L4, H100, B200.
SHARED = {80: 163, 89: 99, 90: 227, 100: 227}
SPILLS = 2  # instructions: a register put aside once, outside the loops, costs nothing
# For a B200 the compiler puts some aside although it uses 72 registers. Tiles without were slower on an H200.
ALLOWED_SPILLS = {(100, "values_kernel"): 14}
NORMS = ["batch", "layer", "none"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Shape = tuple[int, int, int]  # heads, tokens, head_dim
# Of the shipped models, and of ViT-B and ViT-L.
SHAPES: list[Shape] = [
    (12, 197, 32),
    (12, 197, 33),
    (12, 577, 32),
    (12, 577, 33),
    (12, 577, 35),
    (4, 17, 16),
    (12, 197, 64),
    (16, 197, 64),
    (16, 577, 64),
]


class Compiled:
    """Compiles what passes launch, each code once, and keeps a line for each that does not fit."""

    def __init__(self, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability, self.monkeypatch = capability, monkeypatch
        self.seen: set[object] = set()
        self.faults: list[str] = []

    def passes(self, shape: Shape, norm: str, dtype: torch.dtype = BF16, dropout: float = 0.0) -> None:
        """A forward and a backward pass of two images in two chunks. Nothing is computed."""
        launches: list[Launch] = []
        self.monkeypatch.setattr(
            gpu_call, "launch", lambda kernel, grid, *a, **c: launches.append(Launch(kernel, a, c))
        )
        heads, tokens, head_dim = shape
        qkv = torch.zeros(2, tokens, 3, heads, head_dim, dtype=dtype)
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        numbers = torch.zeros(heads)
        mixing = Mixing(torch.zeros(heads, heads), numbers, numbers, numbers, norm, 1e-5)
        seed = torch.tensor(2**61) if dropout else None
        out, log_sums, mean, var = gpu.forward(q, k, v, mixing, seed, dropout, tokens)
        gpu.backward(out, out, log_sums, (mean, var), (q, k, v), mixing, (seed, dropout), tokens)
        for launch in launches:
            if launch.key not in self.seen:
                self.seen.add(launch.key)
                self.check(launch)

    def check(self, launch: Launch) -> None:
        need = launch.compiled_for(self.capability)
        allowed = ALLOWED_SPILLS.get((self.capability, launch.kernel.__name__), SPILLS)
        fits = need.registers * need.threads <= REGISTERS
        fits = fits and need.shared_bytes <= SHARED[self.capability] * 1024
        if need.spills > allowed or not fits:
            self.faults.append(f"sm_{self.capability}: {launch} needs {need}")


def test_kernels_fit_a_hopper_card(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(90, monkeypatch)
    for norm in NORMS:
        compiled.passes(SHAPES[0], norm)
    assert len(compiled.seen) > 20
    assert not compiled.faults


def test_kernels_fit_a_card_with_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(89, monkeypatch)
    compiled.passes((12, 577, 35), "batch")
    assert not compiled.faults


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("norm", NORMS)
def test_kernels_fit_every_card(norm: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Compiled(capability, monkeypatch)
    for shape in SHAPES:
        compiled.passes(shape, norm)
    for dtype in (FP16, FP32):
        compiled.passes(SHAPES[0], norm, dtype)
        compiled.passes((16, 577, 64), norm, dtype)
    for shape in ((12, 197, 32), (16, 577, 64)):
        compiled.passes(shape, norm, dropout=0.1)
    assert not compiled.faults, "\n".join(compiled.faults)
