"""Every optimizer, schedule and loss goes on from a checkpoint to the bits of a run without a stop."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from timm.optim import list_optimizers
from torch import Tensor

from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import Architecture
from deepvit_train.config.shipped import choices
from deepvit_train.config.train import TrainConfig
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.world import World
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT
from deepvit_train.run.saving import write_checkpoint
from deepvit_train.training.finite import FiniteGuard
from deepvit_train.training.loss import build_criterion
from deepvit_train.training.plan import build_plan
from deepvit_train.training.state import TrainState, build_state
from deepvit_train.training.step import StepOptions, train_step

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
STEPS, STOP = 4, 2
SMALL = [
    "model.depth=1",
    "model.dim=12",
    "model.heads=3",
    "model.dropout=0.1",
    "trainer.epochs=2",
    "trainer.batch_size=8",
    "schedule.warmup_lr=0",
    "trainer.accumulate=2",
]
OPTIMIZERS, SCHEDULES, LOSSES = choices("optim"), choices("schedule"), choices("loss")
WEIGHTS = [0.5, 1.0, 1.5, 1.0]


def pairs() -> list[tuple[str, str, str]]:
    """Triples in which each pair of an optimizer, a schedule and a loss comes up."""
    return [
        (optim, schedule, LOSSES[(first + second) % len(LOSSES)])
        for first, optim in enumerate(OPTIMIZERS)
        for second, schedule in enumerate(SCHEDULES)
    ]


def begin(config: TrainConfig) -> TrainState:
    torch.manual_seed(0)
    model = DeepViT(Architecture(config.model, config.attn), num_classes=4)
    plan = build_plan(config.trainer, config.schedule, images=16, world_size=1)
    return build_state(model, config, plan, WORLD)


def advance(state: TrainState, config: TrainConfig, until: int) -> None:
    options = StepOptions(
        seed=0,
        precision=config.trainer.precision,
        label_smoothing=config.loss.label_smoothing,
        mixup=None,
        clip_grad=None,
        max_scaler_skips=2,
        criterion=build_criterion(config.loss, WEIGHTS, WORLD.device),
    )
    guard = FiniteGuard(WORLD, scaled=False)
    state.model.train()
    while state.step < until:
        generator = torch.Generator().manual_seed(state.step)
        size = config.model.image_size
        images = torch.randn(8, 3, size, size, generator=generator)
        targets = torch.randint(4, (8,), generator=generator)
        batches = [Batch(images[half], targets[half], []) for half in (slice(4), slice(4, 8))]
        train_step(state, state.model, batches, WORLD, options, guard)


def save(state: TrainState, folder: Path) -> Path:
    return write_checkpoint(folder, state.step, state.files({}), state.plain())


def content(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{file}.{name}": tensor.clone()
        for file, tensors in state.files({}).items()
        for name, tensor in tensors.tensors.items()
    }


@cache
def composed(*overrides: str) -> TrainConfig:
    return compose_command("train", [*SMALL, *overrides])


def check_resume(config: TrainConfig, folder: Path) -> None:
    """Train with a stop and a restored state, and without: the tensors are equal at the end."""
    whole, before, after = begin(config), begin(config), begin(config)
    advance(whole, config, STEPS)
    advance(before, config, STOP)
    after.restore(save(before, folder))
    for name, tensor in content(before).items():
        assert torch.equal(tensor, content(after)[name]), name
    advance(after, config, STEPS)
    expected, found = content(whole), content(after)
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


@pytest.mark.parametrize(("optim", "schedule", "loss"), pairs())
def test_each_choice_goes_on_to_the_same_bits(optim: str, schedule: str, loss: str, tmp_path: Path) -> None:
    config = composed(f"optim={optim}")
    averaged = None if optim == "schedulefree" else 0.9
    config = replace(
        config,
        schedule=composed(f"schedule={schedule}").schedule,
        loss=composed(f"loss={loss}").loss,
        trainer=replace(config.trainer, ema_decay=averaged),
    )
    check_resume(config, tmp_path)


@pytest.mark.slow
def test_each_name_of_timm_goes_on_to_the_same_bits_or_is_refused(tmp_path: Path) -> None:
    refused, trained = [], []
    names = [str(name) for name in list_optimizers()]
    for name in [*names, "schedulefree_sgd", "schedulefree_radam"]:
        whole = composed("optim.betas=null", "optim.eps=null")
        config = replace(whole, optim=replace(whole.optim, name=name))
        try:
            begin(config)
        except ConfigError:
            refused.append(name)
            continue
        (tmp_path / name).mkdir()
        check_resume(config, tmp_path / name)
        trained.append(name)
    outside = {name for name in names if name.startswith(("bnb", "fused"))}
    assert set(refused) - outside == {"adahessian", "kron", "kronc", "kronw"}
    assert len(trained) > 60
