"""Use re-attention's operator as one of torch's own: autograd, memory, compiler, processes and threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from deepvit_train.commands.bench_cost import peak_bytes
from deepvit_train.models.reattention import HeadMixer, plain_reattention, reattention
from deepvit_train.models.reattention.chunk import CPU_CHUNK_BYTES, Chunks
from deepvit_train.models.reattention.operator import operator
from tests.models.reattention.case import (
    NORMS,
    arguments,
    assert_all_close,
    build_inputs,
    build_norm,
    everything,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", NORMS)
def test_gradient_checkpointing_recomputes_the_same(kind: str) -> None:
    inputs, norm = build_inputs(2, 3, 5, 4), build_norm(kind, 3)

    def checkpointed(*inputs: Any, **options: Any) -> Tensor:
        return checkpoint(reattention, *inputs, use_reentrant=False, **options)

    results = []
    for function in (reattention, checkpointed):
        torch.manual_seed(7)
        results.append(everything(function, inputs, norm, dropout=0.3)[:6])
    assert_all_close(results[0], results[1], 0.0)


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
    out = reattention(*arguments(build_inputs(2, 3, 5, 4)))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_of_some_inputs_only(kind: str) -> None:
    inputs, norm = build_inputs(2, 3, 5, 4), build_norm(kind, 3)
    full = everything(reattention, inputs, norm)[1:6]
    for number in range(5):
        alone = [each.detach() for each in inputs]
        alone[number].requires_grad_()
        out = reattention(*arguments(alone, copy.deepcopy(norm)))
        direction = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view_as(out).cos()
        (gradient,) = torch.autograd.grad(out, alone[number], direction)
        torch.testing.assert_close(gradient, full[number])


@pytest.mark.parametrize("kind", NORMS)
def test_twice_in_one_graph(kind: str) -> None:
    """The second call reuses the first one's memory before the first one's backward pass."""
    inputs, norm = build_inputs(2, 3, 5, 5), build_norm(kind, 3)

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(q: Tensor, k: Tensor, v: Tensor, mixer: HeadMixer) -> Tensor:
            return function(function(q, k, v, mixer), k, q, mixer) + function(k, v, q, mixer)

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
    loss = reattention(*arguments(inputs)).square().sum()
    (gradient,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # of torch's own code
def test_forward_mode_is_refused() -> None:
    q, k, v, *rest = (each.detach() for each in build_inputs(2, 3, 5, 4))
    mixer = HeadMixer(*rest)
    with pytest.raises(RuntimeError):  # and does not give a tangent of 0
        torch.func.jvp(lambda each: reattention(each, k, v, mixer), (q,), (torch.ones_like(q),))


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
            out = reattention(*arguments(inputs, norm), dropout=0.1)
        assert out.requires_grad
        return sum(sizes.values())

    per_token = (4 * 2 * 3 * 4 + 2 * 3) * 4  # B H K of q, k, v, out; B H sums of rows; bytes
    assert saved(50) - saved(20) == 30 * per_token
    assert saved(20) < 20 * per_token + 1000


class Mixed(nn.Module):
    """Re-attention with parameters of its own."""

    def __init__(self, norm: nn.Module | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.theta, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
        self.norm, self.dropout = norm, dropout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return reattention(q, k, v, HeadMixer(self.theta, self.bias, self.norm), dropout=dropout)


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


@pytest.mark.filterwarnings("default")  # torch's own code raises some
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_backward_pass_compiles_too() -> None:
    q, *others = build_inputs(2, 3, 5, 4, dtype=torch.float32)
    (expected,) = torch.autograd.grad(reattention(q, *arguments([q, *others])[1:]).square().sum(), q)
    loss = reattention(*arguments([q, *others])).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close(q.grad, expected, rtol=0, atol=0)


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
            function(*arguments(inputs))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 3 * 25 * (4 + 3 + 4)


def test_training_after_inference_mode() -> None:
    """What inference mode leaves behind is no hindrance to training."""
    inputs = build_inputs(2, 3, 33, 4)
    with torch.inference_mode():
        expected = reattention(*arguments(inputs))
    assert torch.equal(reattention(*arguments(inputs)), expected)


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


def test_memory_grows_with_the_tokens_not_with_their_square() -> None:
    def peak(tokens: int) -> int:
        inputs = build_inputs(1, 12, tokens, 8, dtype=torch.float32)
        norm = build_norm("batch", 12, torch.float32)
        call = lambda: reattention(*arguments(inputs, norm)).sum().backward()  # noqa: E731
        return peak_bytes(call, torch.device("cpu"))

    peaks = {tokens: peak(tokens) for tokens in (512, 1024)}
    assert peaks[1024] < 2 * peaks[512]
    assert peaks[1024] < 12 * 1024**2 * 4  # one image's maps


@pytest.mark.parametrize("rows", [1, 7, 8, 20, 64, 1000])
def test_chunks_cover_everything_once_and_keep_to_their_size(rows: int) -> None:
    chunks = Chunks(torch.empty(5, 2, 8, 4), torch.float32, None, 0.0, rows)
    for slices, total in ((chunks.images, 5), (chunks.rows, 8)):
        assert [place for each in slices for place in range(each.start, each.stop)] == list(range(total))
    most = max(each.stop - each.start for each in chunks.images) * max(e.stop - e.start for e in chunks.rows)
    assert most <= max(rows, 1)


def test_chunks_are_chosen_from_the_sizes() -> None:
    small, large = (Chunks(torch.empty(9, 12, n, 4), torch.float32, None, 0.0, 0) for n in (197, 2048))
    assert [each.stop - each.start for each in small.images] == [2, 2, 2, 2, 1]
    assert len(small.rows) == 1
    assert len(large.images) == 9
    assert 12 * 2048 * 4 * max(each.stop - each.start for each in large.rows) <= CPU_CHUNK_BYTES
