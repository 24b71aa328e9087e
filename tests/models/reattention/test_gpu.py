"""Re-attention's operator on a GPU: against the formula in float64, and among torch's own.

On a machine that has torch, Triton, timm, einops and pytest, but not all of this project's packages:

    python -m pytest -m gpu -p no:cacheprovider --confcutdir=tests/models/reattention \
        tests/models/reattention/test_gpu.py

Triton compiles for each norm, type and head_dim, so the cases share theirs where they can.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="CPU builds of torch bring no Triton")

from deepvit_train.models.reattention import HeadMixer, gpu, operator, plain_reattention, reattention
from deepvit_train.models.reattention.gpu_plan import CHUNK_BYTES
from tests.models.reattention.case import NORMS, build_norm
from tests.models.reattention.gpu_case import Case, differing_bits, faults, found, inputs_of

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPE = (3, 12, 197, 32)  # that of the models of width 384

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns of other things in each version
]

CASES = [
    *(Case(norm, SHAPE, dtype) for dtype in (BF16, FP16, FP32) for norm in NORMS),
    *(Case(norm, SHAPE, FP16, gradient=size) for norm in ("batch", "layer", "none") for size in (1e-2, 1e2)),
    *(Case(norm, SHAPE, dropout=0.2) for norm in ("batch", "layer", "none")),
    *(Case(norm, (5, 12, 197, 32), chunk=2 * 197) for norm in ("batch", "layer", "none")),
    *(Case("batch", SHAPE, FP32, layout=layout) for layout in ("transposed", "broadcast")),
    *(Case("batch", (3, 12, 197, 33), layout=layout) for layout in ("projection", "heads_last")),
    Case("batch", (5, 12, 197, 32), dropout=0.2, chunk=2 * 197),
    Case("batch", SHAPE, spread=0.1, scale=0.25),
    Case("layer", SHAPE, FP16, bias=False),
    Case("batch", (2, 16, 1025, 128)),
    Case("layer", (2, 12, 577, 35)),
    Case("batch", (2, 12, 577, 33), FP32),
    Case("batch", (7, 4, 17, 16)),
    Case("none", (1, 17, 50, 64)),
    Case("batch", (2, 1, 1, 1), FP32),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_formula(case: Case) -> None:
    inputs = inputs_of(case, DEVICE)
    assert operator.gpu_kernels(inputs.q, inputs.k, inputs.v) is gpu
    assert not faults(case, DEVICE)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_two_runs_give_the_same_bits(norm: str, dropout: float) -> None:
    assert not differing_bits(Case(norm, (16, 12, 197, 32), dropout=dropout), DEVICE)


@contextmanager
def tf32_by_matmul_flag() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def tf32_by_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("allowed", [tf32_by_matmul_flag, tf32_by_precision])
@pytest.mark.parametrize("heads", [12, 33])  # with kernels and without
def test_tf32_that_a_caller_allows_changes_nothing(heads: int, allowed: Callable[[], Any]) -> None:
    case = Case("batch", (2, heads, 197, 32), FP32)
    expected = found(case, DEVICE)
    with allowed():
        result = found(case, DEVICE)
        assert torch.backends.cuda.matmul.allow_tf32  # as the caller left it
    for name, tensor in expected.items():
        assert torch.equal(tensor, result[name]), name


def test_without_kernels_it_warns_once_and_is_right() -> None:
    operator._warn_of_slowness.cache_clear()
    case = Case("batch", (2, 3, 50, 8), torch.float64)
    with pytest.warns(UserWarning, match="without its GPU kernels.*float64"):
        result = found(case, DEVICE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found(case, DEVICE)
    inputs = inputs_of(case, DEVICE)
    assert inputs.bias is not None
    assert inputs.norm is not None
    mixer = HeadMixer(inputs.theta.double(), inputs.bias.double(), inputs.norm.double())
    out = plain_reattention(inputs.q, inputs.k, inputs.v, mixer)
    for name, exact in inputs.results(out).items():
        torch.testing.assert_close(result[name], exact, rtol=1e-5, atol=1e-6, check_dtype=False)


class Mixed(nn.Module):
    """Re-attention with parameters of its own."""

    def __init__(self, kind: str, dropout: float = 0.0) -> None:
        super().__init__()
        heads = SHAPE[1]
        self.theta, self.bias = nn.Parameter(torch.randn(heads, heads)), nn.Parameter(torch.randn(heads))
        self.norm, self.dropout = build_norm(kind, heads, FP32), dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reattention(q, k, v, HeadMixer(self.theta, self.bias, self.norm), dropout=self.dropout)


def trained(module: nn.Module, function: Callable[..., Tensor]) -> list[Tensor]:
    """Outputs, gradients and buffers of three steps."""
    inputs = inputs_of(Case("none", SHAPE), DEVICE)
    q, k, v = inputs.q, inputs.k, inputs.v
    results = []
    for step in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        torch.manual_seed(step)  # which decides what dropout drops
        out = function(q, k, v)
        gradients = torch.autograd.grad(out, [q, k, v, *module.parameters()], inputs.dout)
        results += [each.clone() for each in (out.detach(), *gradients, *module.buffers())]
    return results


def assert_trains_alike(module: nn.Module, change: Callable[[nn.Module], Callable[..., Tensor]]) -> None:
    twin = copy.deepcopy(module)
    expected, results = trained(module, module), trained(twin, change(twin))
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradient_checkpointing_recomputes_the_same(norm: str) -> None:
    module = Mixed(norm, dropout=0.2).to(DEVICE)
    expected = trained(module, module)[:8]  # BatchNorm's running statistics count the second pass too
    results = trained(module, lambda *inputs: checkpoint(module, *inputs, use_reentrant=False))[:8]
    for one, other in zip(results, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("norm", "dropout"), [("batch", 0.0), ("layer", 0.2)])
def test_compiles_whole(norm: str, dropout: float) -> None:
    options = {"fallback_random": True}  # the seed of dropout is drawn as without the compiler
    module = Mixed(norm, dropout).to(DEVICE)
    assert_trains_alike(module, lambda twin: torch.compile(twin, fullgraph=True, options=options))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_runs_in_cuda_graphs(norm: str) -> None:
    module = Mixed(norm).to(DEVICE)
    assert_trains_alike(module, lambda twin: torch.compile(twin, fullgraph=True, mode="reduce-overhead"))
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_registration_holds(norm: str, dropout: float) -> None:
    inputs = inputs_of(Case("none", (2, *SHAPE[1:])), DEVICE)
    weight, shift = (torch.randn(SHAPE[1], device=DEVICE).requires_grad_() for _ in range(2))
    seed = torch.tensor(5) if dropout else None
    tensors = (inputs.q, inputs.k, inputs.v, inputs.theta, inputs.bias, weight, shift, seed)
    torch.library.opcheck(operator.operator, (*tensors, norm, 0.1, dropout, 0))


def test_work_goes_to_the_current_stream() -> None:
    inputs = inputs_of(Case("layer", SHAPE), DEVICE)
    q, *others = inputs.arguments()
    expected = reattention(q, *others)
    late = torch.zeros_like(q)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        torch.cuda._sleep(100_000_000)  # in which another stream would see zeros
        late.copy_(q)
        out = reattention(late, *others)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_memory_holds_the_maps_of_a_chunk_alone() -> None:
    shape = (96, 12, 577, 32)
    inputs = inputs_of(Case("batch", shape), DEVICE)
    tensor = inputs.q.numel() * inputs.q.element_size()
    maps = shape[0] * shape[1] * shape[2] ** 2 * inputs.q.element_size()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    inputs.results(reattention(*inputs.arguments()))
    peak = torch.cuda.max_memory_allocated() - before
    # In the backward pass maps and their gradients; out twice, in float32 once; gradients of q, k and v.
    assert peak < 2 * CHUNK_BYTES + 8 * tensor
    assert peak < maps  # of one type, once
