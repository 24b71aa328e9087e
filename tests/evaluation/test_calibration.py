"""Calibrate: the statistics are those of the formula, and the training state stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch

from deepvit_train.config.recipe import Precision
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.world import World
from deepvit_train.evaluation.calibration import calibrate, reattention_norms, statistics_of, using
from deepvit_train.models import DeepViT

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
SHAPE = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 12, "depth": 2, "heads": 3, "mlp_dim": 16}


@pytest.fixture
def model() -> DeepViT:
    torch.manual_seed(0)
    return DeepViT(**SHAPE, attn="reattention", dropout=0.3, drop_path=0.2).train()


def batches(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(torch.randn(size, 3, 8, 8, generator=generator), torch.zeros(size, dtype=torch.long), [])
        for size in sizes
    ]


def test_statistics_are_those_of_the_batches(model: DeepViT) -> None:
    images = batches(6)[0]
    seen = {}

    def note(name: str, mixed: torch.Tensor) -> None:
        seen[name] = (mixed.mean(dim=(0, 2, 3)), mixed.var(dim=(0, 2, 3), unbiased=True))

    reference = copy.deepcopy(model).eval()
    for name, norm in reattention_norms(reference).items():
        norm.train()
        norm.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    reference(images.images)
    found = calibrate(model, [images], Precision.fp32, WORLD)
    assert len(found) == 4
    for name, (mean, variance) in seen.items():
        torch.testing.assert_close(found[f"{name}.running_mean"], mean)
        torch.testing.assert_close(found[f"{name}.running_var"], variance)


def test_batches_count_by_their_images(model: DeepViT) -> None:
    first, second = batches(6, 2)
    apart = [calibrate(model, [batch], Precision.fp32, WORLD) for batch in (first, second)]
    together = calibrate(model, [first, second], Precision.fp32, WORLD)
    for name, value in together.items():
        torch.testing.assert_close(value, (6 * apart[0][name] + 2 * apart[1][name]) / 8)


def test_the_training_state_is_untouched(model: DeepViT) -> None:
    model(batches(4)[0].images)
    before = copy.deepcopy(model.state_dict())
    calibrate(model, batches(5, 3), Precision.bf16, WORLD)
    assert model.training
    assert all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_statistics_hold_inside_the_context_alone(model: DeepViT) -> None:
    before = statistics_of(model)
    images = batches(4)[0].images
    found = calibrate(model, batches(8), Precision.fp32, WORLD)
    plain = model.eval()(images)
    with using(model, found):
        assert all(torch.equal(value, found[name]) for name, value in statistics_of(model).items())
        assert not torch.allclose(model(images), plain)
    assert all(torch.equal(value, before[name]) for name, value in statistics_of(model).items())


@pytest.mark.parametrize("attn", ["self", "reattention_vit_pytorch"])
def test_a_model_without_batch_norm_has_nothing_to_calibrate(attn: str) -> None:
    assert not reattention_norms(DeepViT(**SHAPE, attn=attn))
