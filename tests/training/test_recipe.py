"""Compare the recipe with closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import Architecture
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT
from deepvit_train.training.optimizer import build_optimizer
from deepvit_train.training.plan import build_plan
from deepvit_train.training.recipe import build_ema, build_mixup
from deepvit_train.training.schedule import build_schedule


def small_model(*overrides: str) -> torch.nn.Module:
    config = compose_command("train", ["model.depth=2", "model.dim=16", *overrides])
    return DeepViT(Architecture(config.model, config.attn), num_classes=4)


def test_the_schedule_warms_up_decays_as_a_cosine_and_cools_down() -> None:
    config = compose_command(
        "train", ["schedule.cooldown_epochs=2", "trainer.epochs=20", "schedule.warmup_epochs=5"]
    )
    optimizer = build_optimizer(small_model(), config.optim)
    schedule = build_schedule(optimizer, config.schedule, config.trainer.epochs, steps_per_epoch=10)
    peak, least, start = config.optim.lr, config.schedule.min_lr, config.schedule.warmup_lr
    for step in range(220):
        schedule.step_update(step)
        if step < 50:
            expected = start + (peak - start) * step / 50
        elif step < 200:
            expected = least + 0.5 * (peak - least) * (1 + math.cos(math.pi * step / 200))
        else:
            expected = least
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("decay_theta", [True, False])
def test_weight_decay_leaves_out_vectors_and_tokens(decay_theta: bool) -> None:
    config = compose_command("train", [f"optim.decay_theta={decay_theta}"])
    model = small_model()
    optimizer = build_optimizer(model, config.optim)
    decayed = {
        id(parameter)
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        is_theta = name.endswith(".theta")
        expected = (
            parameter.ndim >= 2 and name not in ("pos_embed", "cls_token") and (decay_theta or not is_theta)
        )
        assert (id(parameter) in decayed) == expected, name


def test_averaged_weights_warm_up() -> None:
    model = small_model()
    ema = build_ema(model, decay=0.999)
    assert ema is not None
    with torch.no_grad():
        model.head.weight.fill_(1.0)
        ema.update(model, step=1)
        assert torch.equal(ema.module.head.weight, model.head.weight)
        model.head.weight.fill_(2.0)
        ema.update(model, step=2)
    expected = 2.0 - (1 - 2 ** (-2 / 3))
    assert ema.module.head.weight[0, 0].item() == pytest.approx(expected)


def test_averaged_weights_without_warm_up_remember_the_first() -> None:
    model = small_model()
    first = model.head.weight.clone()
    ema = build_ema(model, decay=0.9, warmup=False)
    assert ema is not None
    with torch.no_grad():
        model.head.weight.fill_(1.0)
        ema.update(model, step=1)
    torch.testing.assert_close(ema.module.head.weight, 0.9 * first + 0.1)


def test_mixup_needs_pairs() -> None:
    augment = compose_command("train", ["augment=deit"]).augment
    with pytest.raises(ConfigError, match="7 images reach each forward pass"):
        build_mixup(augment, 0.1, num_classes=4, micro_batch=7)
    assert build_mixup(compose_command("train", []).augment, 0.1, num_classes=4, micro_batch=7) is None


def test_the_plan_counts_steps() -> None:
    config = compose_command(
        "train", ["trainer.batch_size=32", "schedule.cooldown_epochs=3", "trainer.save_every_steps=7"]
    )
    plan = build_plan(config.trainer, config.schedule, images=100, world_size=2)
    assert (plan.steps_per_epoch, plan.total_steps, plan.micro_batch) == (3, 189, 16)
    assert [step for step in range(1, 31) if plan.evaluates(step)] == [15, 30]
    assert [step for step in range(1, 31) if plan.saves(step)] == [7, 14, 15, 21, 28, 30]
    assert plan.evaluates(189)


def test_batches_that_do_not_fit_are_refused() -> None:
    config = compose_command("train", ["trainer.batch_size=32"])
    with pytest.raises(ConfigError, match=r"trainer\.batch_size=32 is more than the 20 training images"):
        build_plan(config.trainer, config.schedule, images=20, world_size=1)
    with pytest.raises(ConfigError, match="3 ranks"):
        build_plan(config.trainer, config.schedule, images=200, world_size=3)
    with pytest.raises(ConfigError, match=r"3 training images .* 4 ranks .* nearest: 3 ranks"):
        build_plan(config.trainer, config.schedule, images=3, world_size=4)
