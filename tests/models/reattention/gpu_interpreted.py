"""Run the GPU kernels of re-attention on a CPU, in Triton's interpreter, and compare them with the formula.

    TRITON_INTERPRET=1 python -m tests.models.reattention.gpu_interpreted GROUP...

Triton reads the variable as it is imported, so this is a process of its own, which test_gpu_interpreted.py
starts. It prints a line for each fault, and exits with 1 if there are any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator

import torch

from deepvit_train.models.reattention import gpu, gpu_plan, kernel, operator
from deepvit_train.models.reattention.chunk import Chunks
from deepvit_train.models.reattention.norm import Mixing
from tests.models.reattention.case import NORMS
from tests.models.reattention.gpu_case import Case, differing_bits, faults, kept_entries

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def kinds() -> Iterable[Case]:
    """Norms and types, with a bias and without."""
    for norm in NORMS:
        for dtype in (BF16, FP16, FP32):
            yield Case(norm, (1, 6, 9, 8), dtype, bias=dtype != FP16)


def shapes() -> Iterable[Case]:
    """One token, one head, more heads than fit into a tile of 16, a head_dim that is no power of two."""
    yield Case("batch", (2, 1, 1, 1))
    yield Case("layer", (2, 4, 1, 4), bias=False)
    yield Case("layer", (1, 16, 5, 3), FP32)
    yield Case("batch", (1, 17, 5, 35))
    yield Case("none", (1, 4, 17, 16))
    yield Case("batch", (1, 3, 33, 33), FP16)


def chunks() -> Iterable[Case]:
    """Several chunks, the last of them smaller."""
    for norm in ("batch", "layer", "none"):
        yield Case(norm, (3, 3, 5, 8), FP32, chunk=10)
    yield Case("batch", (3, 3, 5, 33), FP32, chunk=10)


def layouts() -> Iterable[Case]:
    """Entries that do not follow one another in memory, and those that lie on top of one another."""
    for layout in ("transposed", "broadcast"):
        yield from (Case(norm, (2, 3, 5, 8), FP32, layout=layout) for norm in ("batch", "none"))
    for layout in ("transposed", "heads_last", "broadcast"):  # of heads that are widened
        yield Case("batch", (2, 3, 5, 33), FP32, layout=layout)


def extremes() -> Iterable[Case]:
    """Gradients as large and as small as a loss scaler makes them; maps near uniform; a scale."""
    for norm in ("batch", "layer", "none"):
        for gradient in (1e-3, 1e3):
            yield Case(norm, (1, 6, 9, 8), FP16, bias=False, gradient=gradient)
    yield Case("batch", (1, 6, 9, 8), spread=0.05, scale=0.25)
    yield Case("running", (1, 6, 9, 8), FP32, scale=3.0)


def dropout() -> Iterable[Case]:
    """The mask of the forward pass again in the backward pass, and one that chunks do not change."""
    yield from (Case(norm, (1, 6, 9, 8), dropout=0.3) for norm in NORMS)
    yield from (Case(norm, (3, 3, 5, 8), FP32, dropout=0.1, chunk=10) for norm in ("batch", "layer", "none"))
    yield Case("batch", (1, 6, 9, 8), FP16, bias=False, dropout=0.1)


def long_rows() -> Iterable[Case]:
    """Rows that `unmix` goes over twice where rows longer than 32 are called long."""
    yield Case("batch", (1, 4, 33, 8))


def more_long_rows() -> Iterable[Case]:
    """The same for the other norms, with dropout and without."""
    for norm in NORMS:
        yield from (Case(norm, (2, 4, 50, 8), dropout=dropout) for dropout in (0.0, 0.3))


def larger() -> Iterable[Case]:
    """Heads of 32 as models in use have them, and wider ones; 257 tokens, which are two sweeps."""
    for norm in ("batch", "layer", "none"):
        yield Case(norm, (1, 12, 197, 32))
        yield Case(norm, (2, 6, 50, 64), FP16)
        yield Case(norm, (1, 4, 70, 35), FP32)
        yield Case(norm, (2, 6, 50, 33), dropout=0.2)
    yield Case("batch", (1, 4, 257, 16))
    yield Case("layer", (1, 6, 260, 16), dropout=0.1)
    yield Case("batch", (1, 17, 40, 128))


def formula(cases: Callable[[], Iterable[Case]]) -> Callable[[], Iterable[str]]:
    """A check: what the cases get wrong."""

    def check() -> Iterator[str]:
        for case in cases():
            print(case, flush=True)
            yield from faults(case, "cpu")

    return check


def in_two_sweeps(cases: Callable[[], Iterable[Case]]) -> Callable[[], Iterable[str]]:
    """A check: what the cases get wrong where rows longer than 32 are called long."""

    def check() -> Iterator[str]:
        before = gpu_plan.LONGEST_ROW
        gpu_plan.LONGEST_ROW = 32
        gpu_plan.plan_for.cache_clear()
        try:
            yield from formula(cases)()
        finally:
            gpu_plan.LONGEST_ROW = before
            gpu_plan.plan_for.cache_clear()

    return check


def repeats() -> Iterator[str]:
    """Two runs give the same bits."""
    yield from differing_bits(Case("batch", (2, 3, 5, 8), dropout=0.2), "cpu")
    yield from differing_bits(Case("layer", (2, 3, 5, 8)), "cpu")


def masks() -> Iterator[str]:
    """Dropout keeps its share, in another place for another seed, head and image."""
    shape, keep = (2, 3, 40, 8), 0.7
    one, other = (kept_entries(seed, shape, keep, "cpu") for seed in (2**61 + 5, 2**61 + 6))
    count = one.numel()
    if abs(one.mean() - keep) > 4 * (keep * (1 - keep) / count) ** 0.5:
        yield f"dropout keeps {one.mean():.3f} of the entries instead of {keep}"
    independent = keep**2 + (1 - keep) ** 2
    pairs = {"seeds": (one, other), "heads": (one[:, 0], one[:, 1]), "images": (one[0], one[1])}
    for name, pair in pairs.items():
        agreeing = (pair[0] == pair[1]).double().mean()
        if abs(agreeing - independent) > 0.05:
            yield f"masks of two {name} agree in {agreeing:.3f} of the entries instead of {independent:.3f}"


def bias_without_norm() -> Iterator[str]:
    """A bias where there is no norm: `reattention` makes it part of shift, but the operator takes it too."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 2, 3, 5, 8).unbind(0)
    theta, numbers = torch.randn(3, 3), torch.randn(3, 3)
    mixing, exact = (Mixing(theta.to(t), *numbers.to(t), "none", 0.0) for t in (torch.float32, torch.float64))
    out, *rest = gpu.forward(q, k, v, mixing, None, 0.0, 0)
    gradients = gpu.backward(dout, out, rest[0], (rest[1], rest[2]), (q, k, v), mixing, (None, 0.0), 0)
    q, k, v, dout = (each.double() for each in (q, k, v, dout))
    chunks = Chunks(q, torch.float64, None, 0.0, 0)
    exact_out, *rest = kernel.forward(q, k, v, exact, chunks)
    exact_gradients = kernel.backward(dout, (exact_out, *rest), (q, k, v), exact, chunks)
    names = ("out", "dq", "dk", "dv", "dtheta", "dbias", "dweight", "dshift")
    for name, one, other in zip(names, (out, *gradients), (exact_out, *exact_gradients), strict=True):
        if not torch.allclose(one.double(), other, rtol=1e-4, atol=1e-5):
            yield f"without a norm but with a bias: {name} is off by {(one - other).abs().max():.1e}"


GROUPS: dict[str, list[Callable[[], Iterable[str]]]] = {
    "plain": [formula(each) for each in (kinds, shapes, chunks, layouts, extremes)] + [bias_without_norm],
    "dropout": [formula(dropout), masks, repeats, in_two_sweeps(long_rows)],
    "larger": [formula(larger), in_two_sweeps(more_long_rows)],
}


def main(groups: list[str]) -> int:
    torch.set_num_threads(1)
    operator.gpu_kernels = lambda q, k, v: gpu if gpu.covers(q, k, v) else None
    found = [fault for group in groups for check in GROUPS[group] for fault in check()]
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
