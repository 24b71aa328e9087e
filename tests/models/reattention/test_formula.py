"""Compare re-attention's operator with the formula, written as a loop and as differentiable tensor code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deepvit_train.models.reattention import (
    HeadMixer,
    mix_heads,
    plain_reattention,
    reattention,
    softmax_maps,
)
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
        out = function(*arguments(inputs, norm, 0.7))
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
        inputs = list(tensors[: 5 if bias else 4])
        return reattention(*arguments(inputs, norm, 0.7), dropout=0.3, chunk=2)

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
        mixer = HeadMixer(torch.eye(2, dtype=torch.float64))
        dropped = reattention(*inputs[:2], eye, mixer, dropout=0.4, chunk=chunk)
    maps = softmax_maps(*inputs[:2])
    mask = dropped / maps.detach()
    is_kept = mask > 0
    torch.testing.assert_close(mask, is_kept.double() / 0.6, rtol=1e-12, atol=1e-12)
    assert 0.45 < is_kept.double().mean() < 0.75

    def formula(q: Tensor, k: Tensor, v: Tensor, mixer: HeadMixer) -> Tensor:
        return mix_heads(softmax_maps(q, k) * mask, mixer) @ v

    torch.manual_seed(5)
    found = everything(reattention, inputs, norm, **options)
    assert_all_close(found, everything(formula, inputs, norm, scale=0.7))


def test_dropout_follows_the_global_seed_and_differs_between_chunks() -> None:
    q = torch.zeros(4, 2, 8, 8)
    eye, theta = torch.eye(8).expand(4, 2, 8, 8), torch.eye(2)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return reattention(q, q, eye, HeadMixer(theta), dropout=0.5, chunk=8)

    one = draw(1)
    assert torch.equal(one, draw(1))
    assert not torch.equal(one, draw(2))
    assert len({tuple(image.flatten().tolist()) for image in one}) == 4


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
            out = reattention(*arguments(inputs, ours))
            expected = plain_reattention(*arguments(inputs, theirs))
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
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
        plain_reattention(*arguments(build_inputs(1, 2, 1, 3), build_norm("batch", 2)))
    with pytest.raises(ValueError, match="more than one value per head"):
        reattention(*arguments(build_inputs(1, 2, 1, 3), build_norm("batch", 2)))


def test_logits_beyond_half_precision() -> None:
    """Products of 60,000 overflow fp16, and their exponentials everything."""
    q = torch.full((1, 2, 3, 16), 60.0, dtype=torch.float16)
    q[..., 0, :] *= -1
    out = reattention(q, q, q, HeadMixer(torch.eye(2)))
    assert torch.equal(out, q)


def test_an_empty_batch_gives_an_empty_output() -> None:
    out = reattention(*arguments(build_inputs(0, 2, 3, 4), build_norm("layer", 2)))
    assert out.shape == (0, 2, 3, 4)


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
