"""Compare the cosine regulariser with loops, and train with it: accumulated, in half precision."""

from __future__ import annotations

import math

import pytest
import torch

from deepvit_train.config.compose import compose_command
from deepvit_train.config.loss import CosineAxis
from deepvit_train.config.recipe import Precision
from deepvit_train.config.shipped import choices
from deepvit_train.models import DeepViT
from deepvit_train.training.finite import FiniteGuard
from deepvit_train.training.regulariser import CosineRegulariser, build_regulariser
from deepvit_train.training.step import train_step
from tests.training.test_step import WORLD, batch, options, parts, state_of

MAPS = torch.randn(3, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def by_loops(axis: str) -> float:
    """Mean cosine over pairs of blocks, images and vectors, one vector at a time."""
    blocks, images, heads, tokens, _ = MAPS.shape
    cosines = []
    for block in range(blocks - 1):
        for image in range(images):
            one, other = MAPS[block, image], MAPS[block + 1, image]
            if axis == "heads":
                vectors = [(one[:, i, j], other[:, i, j]) for i in range(tokens) for j in range(tokens)]
            else:
                vectors = [(one[h, :, j], other[h, :, j]) for h in range(heads) for j in range(tokens)]
            cosines += [(u @ v / math.sqrt(u @ u) / math.sqrt(v @ v)).item() for u, v in vectors]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("axis", list(CosineAxis))
def test_the_penalty_is_the_mean_cosine(axis: CosineAxis) -> None:
    found = CosineRegulariser(0.1, axis, blocks=3)(list(MAPS))
    assert found.item() == pytest.approx(0.1 * by_loops(axis.value), rel=1e-10)
    same = CosineRegulariser(1.0, axis, blocks=2)([MAPS[0], 3 * MAPS[0]])
    assert same.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("overrides", "depth", "blocks"),
    [
        (["loss.cosine_weight=0"], 6, None),
        (["loss.cosine_weight=0.1"], 6, 6),
        (["loss.cosine_weight=0.1", "loss.cosine_pairs=12"], 32, 13),
        (["loss.cosine_weight=0.1", "loss.cosine_pairs=12"], 6, 6),
        (["loss.cosine_weight=0.1", "loss.cosine_pairs=1"], 2, 2),
    ],
)
def test_as_many_blocks_are_compared_as_there_are(
    overrides: list[str], depth: int, blocks: int | None
) -> None:
    loss = compose_command("train", overrides).loss
    regulariser = build_regulariser(loss, depth)
    assert (None if regulariser is None else regulariser.blocks) == blocks


def step(state, batches, precision: Precision = Precision.fp32, weight: float = 0.5):
    regulariser = CosineRegulariser(weight, CosineAxis.heads, blocks=2) if weight else None
    guard = FiniteGuard(WORLD, scaled=state.scaler.is_enabled())
    return train_step(state, state.model, batches, WORLD, options(precision, regulariser=regulariser), guard)


def test_accumulated_penalties_equal_that_of_the_whole_batch() -> None:
    one, four, without = state_of(), state_of(), state_of()
    first, second = step(one, [batch()]), step(four, parts(batch(), 4))
    plain = step(without, [batch()], weight=0.0)
    assert plain.penalty == 0
    torch.testing.assert_close(first.loss, second.loss)
    torch.testing.assert_close(first.penalty, second.penalty)
    torch.testing.assert_close(first.grad_norm, second.grad_norm)
    torch.testing.assert_close(first.loss, plain.loss + first.penalty)
    assert first.grad_norm != plain.grad_norm


@pytest.mark.parametrize("attn", choices("attn"))
@pytest.mark.parametrize("precision", list(Precision))
def test_training_lowers_the_penalty_in_each_precision(attn: str, precision: Precision) -> None:
    state = state_of(precision, attn)
    penalties = [step(state, [batch()], precision, weight=2.0).penalty.item() for _ in range(30)]
    assert penalties[-1] < penalties[0] - 0.05


def test_half_precision_gives_nearly_the_penalty_of_full_precision() -> None:
    penalties = {p: step(state_of(p, "reattention"), [batch(32)], p).penalty.item() for p in Precision}
    assert penalties[Precision.bf16] == pytest.approx(penalties[Precision.fp32], rel=0.05)
    assert penalties[Precision.fp16] == pytest.approx(penalties[Precision.fp32], rel=0.01)


@pytest.mark.slow
def test_a_compiled_model_gives_its_maps() -> None:
    torch.manual_seed(0)
    model = DeepViT(
        image_size=8, patch_size=4, num_classes=3, dim=12, depth=2, heads=3, mlp_dim=16, attn="reattention"
    )
    images = batch().images
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, found = model(images, map_blocks=2), compiled(images, map_blocks=2)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], expected[1][1], rtol=1e-4, atol=1e-5)
