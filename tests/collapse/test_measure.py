"""Compare measures with cases whose answer is known, and with the definitions written as loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepvit_train.collapse import measure
from deepvit_train.config.collapse import Axis, Metric

EVERY = list(itertools.product(Axis, Metric))


def softmax_maps(seed: int, scale: float = 1.0, shape: tuple[int, ...] = (2, 3, 7, 7)) -> Tensor:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scale * logits).softmax(dim=-1)


def looped_similarity(first: Tensor, second: Tensor, axis: Axis, metric: Metric) -> Tensor:
    """Eq. 2 written out."""
    images, heads, tokens, _ = first.shape
    out = torch.zeros(images, heads, tokens, dtype=torch.float64)
    for b, h, t in itertools.product(range(images), range(heads), range(tokens)):
        pair = []
        for maps in (first, second):
            a = maps[b, h].double()
            if metric == Metric.centred:
                a = a - 1 / tokens
            pair.append(a[:, t] if axis == Axis.column else a[t, :])
        out[b, h, t] = pair[0] @ pair[1] / (pair[0].norm() * pair[1].norm())
    return out


@pytest.mark.parametrize(("axis", "metric"), EVERY)
def test_similarity_is_the_cosine_of_equation_2(axis: Axis, metric: Metric) -> None:
    first, second = softmax_maps(0), softmax_maps(1)
    expected = looped_similarity(first, second, axis, metric)
    found = measure.map_similarity(first, second, axis, metric)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("axis", "metric"), EVERY)
def test_the_matrix_is_the_mean_similarity_of_every_pair(axis: Axis, metric: Metric) -> None:
    maps = [softmax_maps(seed) for seed in range(4)]
    matrix = measure.similarity_matrix(maps, axis, metric)
    for p, q in itertools.product(range(4), range(4)):
        expected = looped_similarity(maps[p], maps[q], axis, metric).mean()
        assert matrix[p, q] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize(("axis", "metric"), EVERY)
def test_identical_maps_have_similarity_1(axis: Axis, metric: Metric) -> None:
    maps = softmax_maps(0)
    assert measure.map_similarity(maps, maps, axis, metric).numpy() == pytest.approx(1.0, abs=1e-6)


def test_columns_and_rows_are_told_apart() -> None:
    # Scaling the queries' rows changes rows' lengths, not their directions, but turns the columns.
    maps = softmax_maps(0)
    scaled = maps * torch.linspace(0.1, 3.0, 7, dtype=torch.float64)[:, None]
    by_row = measure.map_similarity(maps, scaled, Axis.row, Metric.raw)
    by_column = measure.map_similarity(maps, scaled, Axis.column, Metric.raw)
    assert float(by_row.min()) == pytest.approx(1.0, abs=1e-6)
    assert float(by_column.max()) < 0.999


@pytest.mark.parametrize("axis", Axis)
def test_random_maps_have_their_expected_similarity(axis: Axis) -> None:
    # Weights e^x with x ~ N(0, s^2): E[a]^2 / E[a^2] = e^(-s^2) raw, and nothing in common beyond 1/N.
    maps = [softmax_maps(seed, scale=0.5, shape=(4, 4, 100, 100)) for seed in (0, 1)]
    raw = measure.similarity_matrix(maps, axis, Metric.raw)[0, 1]
    centred = measure.similarity_matrix(maps, axis, Metric.centred)[0, 1]
    assert float(raw) == pytest.approx(math.exp(-0.25), abs=0.01)
    assert float(centred) == pytest.approx(0.0, abs=0.01)


def test_small_logits_look_alike_until_they_are_centred() -> None:
    maps = [softmax_maps(seed, scale=0.14, shape=(4, 4, 100, 100)) for seed in (0, 1)]
    assert float(measure.similarity_matrix(maps, Axis.column, Metric.raw)[0, 1]) > 0.97
    assert abs(float(measure.similarity_matrix(maps, Axis.column, Metric.centred)[0, 1])) < 0.01


def test_a_uniform_map_has_no_centred_direction() -> None:
    uniform = torch.full((1, 2, 7, 7), 1 / 7)
    assert measure.map_similarity(uniform, uniform, Axis.column, Metric.raw).numpy() == pytest.approx(1.0)
    assert (measure.map_similarity(uniform, uniform, Axis.column, Metric.centred) == 0).all()


@pytest.mark.parametrize("metric", Metric)
def test_copied_blocks_are_counted_exactly(metric: Metric) -> None:
    distinct = [softmax_maps(seed, scale=2.0) for seed in range(5)]
    maps = [distinct[0], distinct[1], distinct[1], distinct[1], distinct[2], distinct[3], distinct[3]]
    found = measure.similar_blocks(measure.similarity_matrix(maps, Axis.column, metric), threshold=0.999, k=1)
    assert found.tolist() == [False, False, True, True, False, False, True]


def test_k_blocks_before_are_averaged() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.9], [0.1, 0.9, 1.0]])
    assert measure.similar_blocks(similarity, threshold=0.8, k=1).tolist() == [False, True, True]
    assert measure.similar_blocks(similarity, threshold=0.8, k=2).tolist() == [False, True, False]
    assert measure.similar_blocks(similarity, threshold=0.4, k=9).tolist() == [False, True, True]


@given(copies=st.lists(st.booleans(), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_any_pattern_of_copies_is_found(copies: list[bool]) -> None:
    maps = [softmax_maps(99, scale=2.0)]
    for seed, copied in enumerate(copies):
        maps.append(maps[-1] if copied else softmax_maps(seed, scale=2.0))
    found = measure.similar_blocks(
        measure.similarity_matrix(maps, Axis.row, Metric.centred), threshold=0.999, k=1
    )
    assert found.tolist() == [False, *copies]


@pytest.mark.parametrize("k", [1, 2, 9])
def test_the_papers_ratio_of_vectors(k: int) -> None:
    maps = [softmax_maps(seed, scale=2.0, shape=(2, 2, 6, 6)) for seed in range(4)]
    maps[2] = 0.7 * maps[1] + 0.3 * maps[2]
    found = measure.ratio_of_vectors(maps, Axis.column, Metric.raw, k)
    nearest = {1: [0, 2, 3], 2: [1, 3, 0], 3: [2, 1, 0]}
    for block, others in nearest.items():
        count = 0
        for image in range(2):
            one = slice(image, image + 1)
            cosines = [
                looped_similarity(maps[block][one], maps[other][one], Axis.column, Metric.raw)
                for other in others
            ]
            average = torch.stack(cosines[:k]).mean()
            count += int((cosines[0] > average).sum())
        assert float(found[block - 1]) == pytest.approx(count / (2 * 2 * 6))
    assert measure.ratio_of_vectors(maps[:1], Axis.column, Metric.raw, k).shape == (0,)


def test_the_deviation_from_uniform_maps() -> None:
    uniform, sharp = torch.full((2, 1, 5, 5), 0.2), torch.eye(5).expand(2, 1, 5, 5)
    assert measure.deviation(uniform).tolist() == pytest.approx([0.0], abs=1e-9)
    assert measure.deviation(sharp).tolist() == pytest.approx([(0.8**2 + 4 * 0.2**2) ** 0.5])
    # Two identical uniform maps have a centred cosine of 0: only the deviation tells that they are alike.
    assert float(measure.map_similarity(uniform, uniform, Axis.column, Metric.centred).max()) == 0.0


def test_a_ratio_counts_the_blocks_that_can_be_similar() -> None:
    assert measure.similar_ratio(torch.tensor([False, True, True])) == 1.0
    assert measure.similar_ratio(torch.tensor([False, True, False])) == 0.5
    assert measure.similar_ratio(torch.tensor([False])) == 0.0


def test_similarity_of_heads() -> None:
    maps = softmax_maps(0, scale=2.0)
    maps[:, 2] = maps[:, 0]
    similarity = measure.head_similarity(maps, Axis.column, Metric.raw)
    expected = looped_similarity(maps[:, :1], maps[:, 1:2], Axis.column, Metric.raw).mean()
    assert float(similarity[0, 2]) == pytest.approx(1.0, abs=1e-6)
    assert float(similarity[0, 1]) == pytest.approx(float(expected), abs=1e-5)
    mean = float(similarity[0, 1] + similarity[0, 2] + similarity[1, 2]) / 3
    assert measure.off_diagonal_mean(similarity) == pytest.approx(mean)


def test_similarity_of_features() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    matrix = measure.feature_similarity([first, -3.0 * first, second])
    expected = torch.nn.functional.cosine_similarity(first, second, dim=-1).mean()
    assert float(matrix[0, 1]) == pytest.approx(-1.0, abs=1e-6)
    assert float(matrix[0, 2]) == pytest.approx(float(expected), abs=1e-6)


def test_similarity_between_tokens() -> None:
    same = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 5, 8)
    assert measure.token_similarity(same) == pytest.approx(1.0)
    assert measure.token_similarity(torch.eye(5)[None]) == pytest.approx(0.0)
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert measure.token_similarity(opposite) == pytest.approx(-1.0)


def test_entropy_of_uniform_and_identity_maps() -> None:
    assert measure.entropy(torch.full((2, 3, 7, 7), 1 / 7)).numpy() == pytest.approx(math.log(7))
    assert measure.entropy(torch.eye(7).expand(2, 3, 7, 7)).numpy() == pytest.approx(0.0)


def test_attention_distance() -> None:
    grid, tokens = (2, 3), 7
    assert measure.attention_distance(torch.eye(tokens).expand(1, 2, 7, 7), grid).tolist() == [0.0, 0.0]
    uniform = torch.full((1, 1, tokens, tokens), 1 / tokens)
    places = list(itertools.product(range(2), range(3)))
    expected = sum(math.dist(a, b) for a in places for b in places) / 36
    assert float(measure.attention_distance(uniform, grid)) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_map_made_of_k_parts_has_rank_k(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    left = torch.rand(2, 3, 7, k, generator=generator)
    right = torch.rand(2, 3, k, 7, generator=generator)
    maps = (left / left.sum(-1, keepdim=True)) @ (right / right.sum(-1, keepdim=True))
    assert measure.rank(maps).tolist() == [float(k)] * 3
