"""Cases for the GPU kernels of re-attention, each compared with the formula in float64.

The same cases run on a GPU (test_gpu.py) and in Triton's interpreter (gpu_interpreted.py).

Shapes: B batch, N tokens, H heads, HP padded heads, K head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from deepvit_train.models.reattention import HeadMixer, reattention
from deepvit_train.models.reattention.formula import mix_heads, softmax_maps
from deepvit_train.models.reattention.gpu_part import kept
from tests.models.reattention.case import build_norm

# Errors allowed in out, dq, dk and dv, relative: about twice what it costs to round the exact result.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 5e-6}
# And in results that are float32 whatever the type of q: of Theta, bias and norm.
TOLERANCE_OF_PARAMETERS = {torch.bfloat16: 1e-2, torch.float16: 5e-3, torch.float32: 2e-5}
SEED = 11

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of `reattention`, and its gradient.

    norm: a key of `case.NORMS`; shape: (B, H, N, K); layout: "projection", "transposed", "heads_last" or
    "broadcast"; spread: the size of q and k, so how far maps are from uniform; gradient: the size of that of
    out.
    """

    norm: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    bias: bool = True
    scale: float = 1.0
    dropout: float = 0.0
    chunk: int = 0
    layout: str = "projection"
    spread: float = 0.7
    gradient: float = 1.0

    def __str__(self) -> str:
        words = [self.norm, "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")]
        for field in fields(self)[3:]:
            if (value := getattr(self, field.name)) != field.default:
                words.append(f"{field.name}={value}")
        return " ".join(words)


@dataclass
class Inputs:
    """The tensors of a case."""

    q: Tensor
    k: Tensor
    v: Tensor
    theta: Tensor
    bias: Tensor | None
    norm: nn.Module | None
    dout: Tensor

    def arguments(self, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, HeadMixer]:
        """The positional arguments of `reattention`."""
        return self.q, self.k, self.v, HeadMixer(self.theta, self.bias, self.norm, scale)

    @property
    def leaves(self) -> Results:
        """What a gradient is wanted of, by the name of the gradient."""
        named = {"dq": self.q, "dk": self.k, "dv": self.v, "dtheta": self.theta, "dbias": self.bias}
        if self.norm is not None:
            named |= {"dweight": self.norm.weight, "dshift": self.norm.bias}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def results(self, out: Tensor) -> Results:
        """out, its gradients, and the norm's running statistics."""
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.dout)
        buffers = {} if self.norm is None else dict(self.norm.named_buffers())
        buffers.pop("num_batches_tracked", None)
        return {"out": out.detach()} | dict(zip(self.leaves, gradients, strict=True)) | buffers


def inputs_of(case: Case, device: str) -> Inputs:
    """The same numbers each time."""
    torch.manual_seed(SEED)
    batch, heads, tokens, head_dim = case.shape
    qkv = torch.randn(batch, tokens, 3, heads, head_dim)
    qkv[:, :, :2] *= case.spread
    dout = (torch.randn(batch, tokens, heads, head_dim) * case.gradient).to(device, case.dtype)
    q, k, v, dout = (each.transpose(1, 2) for each in (*qkv.to(device, case.dtype).unbind(2), dout))
    if case.layout == "transposed":  # entries of a row do not follow one another in memory
        q, k, v, dout = (each.mT.contiguous().mT for each in (q, k, v, dout))
    elif case.layout == "heads_last":
        q, k, v, dout = (
            each.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for each in (q, k, v, dout)
        )
    elif case.layout == "broadcast":  # strides of 0, as those of the gradient of a sum
        q, k, v, dout = q, k[:1].expand_as(k), v[:, :1].expand_as(v), dout[:1, :1, :1, :1].expand_as(dout)
    theta = (torch.randn(heads, heads) * heads**-0.5).to(device)
    bias = (torch.randn(heads) * heads**-0.5).to(device).requires_grad_() if case.bias else None
    # With a momentum of 1 the running statistics are those of the batch.
    norm = build_norm(case.norm, heads, torch.float32, **({"momentum": 1.0} if case.norm == "batch" else {}))
    if case.norm == "running":  # of the size that training finds
        norm.running_var.mul_(tokens**-2.0)
        norm.running_mean.div_(tokens)
    leaves = [each.requires_grad_() for each in (q, k, v, theta)]
    return Inputs(*leaves, bias, None if norm is None else norm.to(device), dout)


def found(case: Case, device: str) -> Results:
    """What the operator computes."""
    inputs = inputs_of(case, device)
    torch.manual_seed(SEED)  # which decides what dropout drops
    out = reattention(*inputs.arguments(case.scale), dropout=case.dropout, chunk=case.chunk)
    return inputs.results(out)


def expected(case: Case, device: str) -> Results:
    """What the formula says, in float64, from the same inputs and the same entries dropped."""
    inputs = inputs_of(case, device)
    double = {name: getattr(inputs, name) for name in ("q", "k", "v", "theta", "bias", "dout")}
    for name, tensor in double.items():
        double[name] = None if tensor is None else tensor.detach().double().requires_grad_()
    exact = Inputs(norm=None if inputs.norm is None else inputs.norm.double(), **double)
    q, k, v, mixer = exact.arguments(case.scale)
    maps = softmax_maps(q, k)
    if case.dropout:
        torch.manual_seed(SEED)
        seed = torch.randint(2**62, (), device="cpu")  # as `reattention` draws it
        maps = maps * kept_entries(int(seed), case.shape, 1 - case.dropout, device) / (1 - case.dropout)
    results = exact.results(mix_heads(maps, mixer) @ v)
    if case.bias and case.norm == "batch":  # it has no effect, but float64's own rounding gives it a gradient
        results["dbias"].zero_()
    return results


def errors(case: Case, device: str) -> dict[str, float]:
    """The relative error of each result, in the Euclidean norm."""
    one, other = found(case, device), expected(case, device)
    assert one.keys() == other.keys()
    # Of a single token the gradient of q is 0, but for float64's own rounding.
    least = 1e-6 * case.gradient
    return {
        name: ((one[name].double() - exact).norm() / exact.norm().clamp_min(least)).item()
        for name, exact in other.items()
    }


def faults(case: Case, device: str) -> list[str]:
    """A line for each result that is further from the formula than rounding explains."""
    lines = []
    for name, error in errors(case, device).items():
        allowed = (TOLERANCE if name in ("out", "dq", "dk", "dv") else TOLERANCE_OF_PARAMETERS)[case.dtype]
        if not error <= allowed:  # not a number is a fault too
            lines.append(f"{case}: {name} is off by {error:.1e}, allowed are {allowed:.1e}")
    return lines


def differing_bits(case: Case, device: str) -> list[str]:
    """A line for each result that a second run makes otherwise."""
    one, other = found(case, device), found(case, device)
    names = [name for name in one if not torch.equal(one[name], other[name])]
    return [f"{case}: {name} differs between two runs" for name in names]


@triton.jit(do_not_specialize=["seed"])
def kept_kernel(KEPT, seed, N, keep, H: tl.constexpr, HP: tl.constexpr, COLUMNS: tl.constexpr):
    """KEPT (B, H, N, N): 1 where dropout keeps an entry of the maps, else 0."""
    image = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    keeping = kept(seed, image, c // N, c % N, N, keep, H, HP)
    place = KEPT + (image * H + h) * N * N + c[None, :]
    tl.store(place, keeping.to(tl.int8), mask=(h < H) & (c[None, :] < N * N))


def kept_entries(seed: int, shape: tuple[int, int, int, int], keep: float, device: str) -> Tensor:
    """(B, H, N, N), float64: 1 where dropout keeps an entry of the maps, else 0."""
    batch, heads, tokens, _ = shape
    entries = torch.empty(batch, heads, tokens, tokens, dtype=torch.int8, device=device)
    grid: Any = (batch, triton.cdiv(tokens**2, 256))
    padded_heads = triton.next_power_of_2(heads)
    kept_kernel[grid](entries, seed, tokens, keep, H=heads, HP=padded_heads, COLUMNS=256)
    return entries.double()
