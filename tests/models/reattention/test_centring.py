"""Compare the norms that centre rows with their formulas, with and without maps that are kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepvit_train.models.reattention import (
    AttentionScale,
    Centring,
    HeadMixer,
    plain_reattention,
    reattention,
)
from deepvit_train.models.reattention.formula import call_operator
from tests.models.reattention.case import arguments, assert_all_close, build_inputs, everything

NORMS = [Centring, AttentionScale]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(kind: type[Centring], heads: int) -> Centring:
    norm = kind(heads).double()
    with torch.no_grad():
        next(norm.parameters()).normal_()
    return norm


def looped(inputs: list[Tensor], norm: Centring, scale: float) -> Tensor:
    """Both formulas, number by number: scale * (gain (A - 1/N) or A + omega (A - 1/N)) v, of mixed maps."""
    q, k, v, theta, bias = (each.detach() for each in inputs)
    out = torch.zeros_like(q)
    batch, heads, tokens, head_dim = q.shape
    for b, g, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, tokens))).tolist():
        row = torch.full((tokens,), float(bias[g]), dtype=q.dtype)
        for h in range(heads):
            powers = [math.exp(float(q[b, h, i] @ k[b, h, j]) / head_dim**0.5) for j in range(tokens)]
            row += theta[h, g] * torch.tensor(powers, dtype=q.dtype) / sum(powers)
        mean = sum(row.tolist()) / tokens
        for j in range(tokens):
            if isinstance(norm, AttentionScale):
                weight = row[j] + norm.omega[g] * (row[j] - mean)
            else:
                weight = norm.gain[g] * (row[j] - mean)
            out[b, g, i] += scale * weight.detach() * v[b, g, j]
    return out


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("function", [plain_reattention, reattention])
def test_equals_a_loop_over_the_formula(kind: type[Centring], function) -> None:
    inputs, norm = build_inputs(2, 3, 4, 5), build(kind, 3)
    with torch.no_grad():
        out = function(*arguments(inputs, norm, 0.7))
    torch.testing.assert_close(out, looped(inputs, norm, 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_gives_the_gradients_of_the_formula_and_keeps_no_map(
    kind: type[Centring], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, norm = build_inputs(2, 3, 6, 4, bias=bias), build(kind, 3)
    expected = everything(plain_reattention, inputs, norm, scale=0.7)
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return call_operator(*arguments)

    monkeypatch.setattr("deepvit_train.models.reattention.formula.call_operator", counted)
    assert_all_close(everything(reattention, inputs, norm, scale=0.7), expected, 1e-9)
    assert calls  # the maps were not kept


@pytest.mark.parametrize("kind", NORMS)
def test_under_dropout_the_mean_is_that_of_the_dropped_row(kind: type[Centring]) -> None:
    inputs, norm = build_inputs(2, 3, 6, 4), build(kind, 3)
    results = []
    for function in (reattention, plain_reattention):
        torch.manual_seed(3)
        results.append(function(*arguments(inputs, norm), dropout=0.4))
    assert torch.equal(*results)


def test_as_they_start_one_centres_and_the_other_changes_nothing() -> None:
    q, k, v = (each.detach() for each in build_inputs(2, 3, 6, 4, bias=False)[:3])
    eye = torch.eye(3, dtype=torch.float64)
    plain = reattention(q, k, v, HeadMixer(eye))
    scaled = reattention(q, k, v, HeadMixer(eye, norm=AttentionScale(3).double()))
    centred = reattention(q, k, v, HeadMixer(eye, norm=Centring(3).double()))
    torch.testing.assert_close(scaled, plain)
    torch.testing.assert_close(centred, plain - v.mean(dim=2, keepdim=True))
