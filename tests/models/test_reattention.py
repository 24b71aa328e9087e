"""Re-attention's operator against the formula, written as a loop and as plain differentiable tensor code."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deepvit_train.models.reattention import mix_heads, plain_reattention, reattention, softmax_maps
from deepvit_train.models.reattention_operator import operator

NORMS = ["batch", "running", "layer", "none"]


def build_norm(kind: str, heads: int, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module | None:
    """A norm with weights, and running statistics, that leave no term out."""
    if kind == "none":
        return None
    norm = (nn.LayerNorm if kind == "layer" else nn.BatchNorm2d)(heads, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
        if kind == "running":
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return norm.to(dtype).train(kind != "running")


def build_inputs(
    batch: int,
    heads: int,
    tokens: int,
    head_dim: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """q, k, v, theta and perhaps theta_bias, all requiring gradients."""
    shapes = [(batch, heads, tokens, head_dim)] * 3 + [(heads, heads)] + [(heads,)] * bias
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def everything(
    function: Callable[..., Tensor], inputs: list[Tensor], norm: nn.Module | None, **options: Any
) -> list[Tensor]:
    """Output, all gradients, and the norm's buffers after the call."""
    norm = copy.deepcopy(norm)
    parameters = [] if norm is None else list(norm.parameters())
    bias = inputs[4] if len(inputs) == 5 else None
    out = function(*inputs[:4], bias, norm, **options)
    direction = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out).cos()
    # In the layout in which it comes from the projection.
    direction = direction.transpose(1, 2).contiguous().transpose(1, 2)
    gradients = torch.autograd.grad(out, [*inputs, *parameters], direction)
    return [out.detach(), *gradients, *([] if norm is None else norm.buffers())]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def looped(inputs: list[Tensor], norm: nn.Module | None, scale: float) -> Tensor:
    """The formula, number by number."""
    q, k, v, theta, bias = (each.detach() for each in inputs)
    batch, heads, tokens, head_dim = q.shape
    maps = torch.empty(batch, heads, tokens, tokens, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
        powers = [math.exp(float(q[b, h, i] @ k[b, h, j]) / head_dim**0.5) for j in range(tokens)]
        maps[b, h, i] = torch.tensor(powers, dtype=q.dtype) / sum(powers)
    mixed = torch.stack(
        [sum(maps[:, h] * theta[h, g] for h in range(heads)) + bias[g] for g in range(heads)], dim=1
    )
    if isinstance(norm, nn.LayerNorm):
        mixed = (mixed - mixed.mean(1, keepdim=True)) / (
            mixed.var(1, keepdim=True, correction=0) + norm.eps
        ).sqrt()
    elif norm is not None:
        for g in range(heads):
            mean, var = mixed[:, g].mean(), mixed[:, g].var(correction=0)
            if not norm.training:
                mean, var = norm.running_mean[g], norm.running_var[g]
            mixed[:, g] = (mixed[:, g] - mean) / (var + norm.eps).sqrt()
    if norm is not None:
        mixed = mixed * norm.weight[:, None, None] + norm.bias[:, None, None]
    out = torch.empty_like(q)
    for b, g, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
        out[b, g, i] = sum(scale * mixed[b, g, i, j] * v[b, g, j] for j in range(tokens))
    return out


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("function", [plain_reattention, reattention])
def test_equals_a_loop_over_the_formula(kind: str, function: Callable[..., Tensor]) -> None:
    inputs, norm = build_inputs(2, 3, 4, 5), build_norm(kind, 3)
    expected = looped(inputs, copy.deepcopy(norm), 0.7)
    with torch.no_grad():
        out = function(*inputs, norm, scale=0.7)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(NORMS),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 7), st.integers(1, 9)),
    bias=st.booleans(),
    chunk=st.integers(0, 20),
)
def test_function_gradients_and_running_statistics_are_the_formulas(
    kind: str, shape: tuple[int, int, int, int], bias: bool, chunk: int
) -> None:
    if kind == "batch" and shape[0] * shape[2] == 1:
        shape = (2, *shape[1:])
    inputs, norm = build_inputs(*shape, bias=bias), build_norm(kind, shape[1])
    found = everything(reattention, inputs, norm, scale=0.7, chunk=chunk)
    expected = everything(plain_reattention, inputs, norm, scale=0.7)
    # With one head LayerNorm divides 0 by the root of its epsilon: rounding is amplified 300 times.
    assert_all_close(found, expected, 1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", NORMS)
def test_gradcheck(kind: str, bias: bool) -> None:
    norm = build_norm(kind, 2, eps=0.1) if kind != "none" else None
    parameters = [] if norm is None else list(norm.parameters())

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(1)
        mixing = tensors[: 5 if bias else 4]
        return reattention(*mixing, *[None] * (5 - len(mixing)), norm, scale=0.7, dropout=0.3, chunk=2)

    assert torch.autograd.gradcheck(function, (*build_inputs(2, 2, 3, 2, bias=bias), *parameters))


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("chunk", [0, 3, 6])
def test_dropout_is_dropout_of_the_softmax_maps(kind: str, chunk: int) -> None:
    inputs, norm = build_inputs(3, 2, 6, 6), build_norm(kind, 2)
    options = {"scale": 0.7, "dropout": 0.4, "chunk": chunk}
    # With Theta = 1 and v = 1, what comes out are the dropped maps: the same seed shows what was dropped.
    eye = torch.eye(6, dtype=torch.float64).expand(3, 2, 6, 6)
    torch.manual_seed(5)
    with torch.no_grad():
        dropped = reattention(*inputs[:2], eye, torch.eye(2, dtype=torch.float64), dropout=0.4, chunk=chunk)
    maps = softmax_maps(*inputs[:2])
    mask = dropped / maps.detach()
    is_kept = mask > 0
    torch.testing.assert_close(mask, is_kept.double() / 0.6, rtol=1e-12, atol=1e-12)
    assert 0.45 < is_kept.double().mean() < 0.75

    def formula(q: Tensor, k: Tensor, v: Tensor, *mixing: Any, **_: Any) -> Tensor:
        return mix_heads(softmax_maps(q, k) * mask, *mixing, 0.7) @ v

    torch.manual_seed(5)
    found = everything(reattention, inputs, norm, **options)
    assert_all_close(found, everything(formula, inputs, norm))


def test_dropout_follows_the_global_seed_and_differs_between_chunks() -> None:
    q = torch.zeros(4, 2, 8, 8)
    eye, theta = torch.eye(8).expand(4, 2, 8, 8), torch.eye(2)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return reattention(q, q, eye, theta, dropout=0.5, chunk=8)

    one = draw(1)
    assert torch.equal(one, draw(1))
    assert not torch.equal(one, draw(2))
    assert len({tuple(image.flatten().tolist()) for image in one}) == 4


@pytest.mark.parametrize("kind", NORMS)
def test_gradient_checkpointing_recomputes_the_same(kind: str) -> None:
    inputs, norm = build_inputs(2, 3, 5, 4), build_norm(kind, 3)

    def checkpointed(*arguments: Any, **options: Any) -> Tensor:
        return checkpoint(reattention, *arguments, use_reentrant=False, **options)

    results = []
    for function in (reattention, checkpointed):
        torch.manual_seed(7)
        results.append(everything(function, inputs, norm, dropout=0.3)[:6])
    assert_all_close(results[0], results[1], 0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.3},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"momentum": 0.0},
    ],
)
def test_batchnorm_in_all_its_modes(options: dict[str, Any]) -> None:
    ours, theirs = (build_norm("batch", 3, **options) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for step in range(5):
        for norm in (ours, theirs):
            norm.train(step != 3)
        inputs = build_inputs(2, 3, 5, 4)
        with torch.no_grad():
            out = reattention(*inputs, ours)
            torch.testing.assert_close(out, plain_reattention(*inputs, theirs), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{"elementwise_affine": False}, {"bias": False}, {"eps": 0.5}])
def test_layernorm_in_all_its_forms(options: dict[str, Any]) -> None:
    inputs, norm = build_inputs(2, 3, 5, 4), build_norm("layer", 3, **options)
    assert_all_close(everything(reattention, inputs, norm), everything(plain_reattention, inputs, norm))


def test_another_norm_is_called_as_it_is() -> None:
    inputs, norm = build_inputs(2, 3, 5, 4), nn.InstanceNorm2d(3, affine=True).double()
    assert_all_close(everything(reattention, inputs, norm), everything(plain_reattention, inputs, norm))


def test_batchnorm_refuses_one_value_per_head() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        plain_reattention(*build_inputs(1, 2, 1, 3), build_norm("batch", 2))
    with pytest.raises(ValueError, match="more than one value per head"):
        reattention(*build_inputs(1, 2, 1, 3), build_norm("batch", 2))


def test_an_empty_batch_gives_an_empty_output() -> None:
    assert reattention(*build_inputs(0, 2, 3, 4), build_norm("layer", 2)).shape == (0, 2, 3, 4)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "broadcast": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout: str, kind: str) -> None:
    inputs, norm = build_inputs(3, 2, 5, 4), build_norm(kind, 2)
    strided = [LAYOUTS[layout](each.detach()).requires_grad_() for each in inputs[:3]]
    plain = [each.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for each in strided]
    found = everything(reattention, [*strided, *inputs[3:]], norm)
    assert_all_close(found, everything(plain_reattention, [*plain, *inputs[3:]], norm))


def test_output_is_laid_out_for_the_projection() -> None:
    out = reattention(*build_inputs(2, 3, 5, 4))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_of_some_inputs_only(kind: str) -> None:
    inputs, norm = build_inputs(2, 3, 5, 4), build_norm(kind, 3)
    full = everything(reattention, inputs, norm)[1:6]
    for number in range(5):
        alone = [each.detach() for each in inputs]
        alone[number].requires_grad_()
        out = reattention(*alone, copy.deepcopy(norm))
        direction = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out).cos()
        (gradient,) = torch.autograd.grad(out, alone[number], direction)
        torch.testing.assert_close(gradient, full[number])


@pytest.mark.parametrize("kind", NORMS)
def test_twice_in_one_graph(kind: str) -> None:
    """The second call reuses the first one's memory before the first one's backward pass."""
    inputs, norm = build_inputs(2, 3, 5, 5), build_norm(kind, 3)

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(q: Tensor, k: Tensor, v: Tensor, *mixing: Any) -> Tensor:
            return function(function(q, k, v, *mixing), k, q, *mixing) + function(k, v, q, *mixing)

        return inner

    assert_all_close(
        everything(twice(reattention), inputs, norm), everything(twice(plain_reattention), inputs, norm), 1e-8
    )


def test_inputs_are_left_as_they_were() -> None:
    inputs = build_inputs(2, 3, 5, 4)
    before = [each.detach().clone() for each in inputs]
    everything(reattention, inputs, build_norm("batch", 3))
    assert_all_close([each.detach() for each in inputs], before, 0.0)


def test_second_derivatives_are_refused_by_name() -> None:
    inputs = build_inputs(2, 3, 5, 4)
    (gradient,) = torch.autograd.grad(reattention(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", NORMS)
def test_no_map_is_saved(kind: str) -> None:
    """Saved are q, k, v, the output, a number per row, and numbers per head: linear in the tokens."""

    def saved(tokens: int) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs, norm = build_inputs(2, 3, tokens, 4, dtype=torch.float32), build_norm(kind, 3, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = reattention(*inputs, norm, dropout=0.1)
        assert out.requires_grad
        return sum(sizes.values())

    per_token = (4 * 2 * 3 * 4 + 2 * 3) * 4  # B H K of q, k, v, out; B H sums of rows; bytes
    assert saved(50) - saved(20) == 30 * per_token
    assert saved(20) < 20 * per_token + 1000


@pytest.mark.parametrize("kind", NORMS)
def test_float32_is_as_near_to_float64_as_the_formula(kind: str) -> None:
    """On maps that hug 1/N, as those of a new model do."""
    inputs, norm = build_inputs(2, 4, 17, 8), build_norm(kind, 4)
    with torch.no_grad():
        for each in inputs[:2]:
            each.mul_(0.03)
    exact = everything(plain_reattention, inputs, norm)

    def error(function: Callable[..., Tensor]) -> list[float]:
        singles = [each.detach().float().requires_grad_() for each in inputs]
        found = everything(function, singles, copy.deepcopy(norm) and copy.deepcopy(norm).float())
        return [float((one - two).abs().max()) for one, two in zip(found, exact, strict=True)]

    for ours, plain in zip(error(reattention), error(plain_reattention), strict=True):
        assert ours <= 4 * plain + 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NORMS)
def test_half_precision_rounds_inputs_and_outputs_only(kind: str, dtype: torch.dtype) -> None:
    inputs, norm = build_inputs(2, 4, 17, 8, dtype=torch.float32), build_norm(kind, 4, torch.float32)
    halves = [each.detach().to(dtype).requires_grad_() for each in inputs[:3]]
    mixing = [each.detach().requires_grad_() for each in inputs[3:]]
    with torch.autocast("cpu", torch.bfloat16):
        found = everything(reattention, halves + mixing, norm)
    assert [each.dtype for each in found[:6]] == [dtype] * 4 + [torch.float32] * 2
    doubles = [each.detach().double().requires_grad_() for each in halves + mixing]
    exact = everything(plain_reattention, doubles, norm and copy.deepcopy(norm).double())
    for one, other in zip(found, exact, strict=True):
        if one.is_floating_point():  # num_batches_tracked is not
            bound = torch.finfo(dtype).eps * float(other.abs().max()) + 1e-5
            assert float((one - other).abs().max()) <= bound


class Mixed(nn.Module):
    """Re-attention with parameters of its own."""

    def __init__(self, norm: nn.Module | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.theta, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.norm, self.dropout = norm, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return reattention(q, k, v, self.theta, self.bias, self.norm, dropout=dropout)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("kind", NORMS)
def test_compiles_and_exports_whole(kind: str) -> None:
    norm = build_norm(kind, 3, torch.float32, **({"momentum": None} if kind == "batch" else {}))
    module, twin = (Mixed(copy.deepcopy(norm), dropout=0.2).train(kind != "running") for _ in range(2))
    twin.load_state_dict(module.state_dict())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = build_inputs(2, 3, 5, 4, dtype=torch.float32)[:3]
    for each in (compiled, twin):
        torch.manual_seed(3)
        each(*inputs).square().sum().backward()
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    torch.testing.assert_close(module.state_dict(), twin.state_dict())
    exported = torch.export.export(twin.eval(), tuple(inputs))
    torch.testing.assert_close(exported.module()(*inputs), twin(*inputs))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("kind", ["batch", "layer", "none"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_registration_holds(kind: str, dropout: float) -> None:
    inputs = build_inputs(2, 3, 5, 4)
    weight, shift = (torch.randn(3, dtype=torch.float64).requires_grad_() for _ in range(2))
    seed = torch.tensor(5) if dropout else None
    torch.library.opcheck(operator, (*inputs, weight, shift, seed, kind, 0.1, dropout, 4))


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_distributed_data_parallel_finds_every_parameter_used(kind: str, tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = DistributedDataParallel(Mixed(build_norm(kind, 3, torch.float32)))
        for _ in range(2):  # the second step fails where a parameter got no gradient in the first
            module(*build_inputs(2, 3, 5, 4, dtype=torch.float32)[:3]).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_counts_the_operations_of_the_formula() -> None:
    inputs = build_inputs(2, 3, 5, 4)
    counts = []
    for function in (reattention, plain_reattention):
        with FlopCounterMode(display=False) as counter:
            function(*inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 3 * 25 * (4 + 3 + 4)


def test_training_after_inference_mode() -> None:
    """What inference mode leaves behind is no hindrance to training."""
    inputs = build_inputs(2, 3, 33, 4)
    with torch.inference_mode():
        expected = reattention(*inputs)
    assert torch.equal(reattention(*inputs), expected)


def test_threads_do_not_share_memory() -> None:
    inputs = [build_inputs(4, 3, 40, 4) for _ in range(4)]
    expected = [everything(reattention, each, None) for each in inputs]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        for _ in range(5):
            found[number] = everything(reattention, inputs[number], None)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, each in enumerate(expected):
        assert_all_close(found[number], each, 1e-12)
