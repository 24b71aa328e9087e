"""Compare the optimizers' groups, arguments and averages with what they should be."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from timm.optim import Lion

from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import Architecture
from deepvit_train.config.shipped import choices
from deepvit_train.config.train import TrainConfig
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT
from deepvit_train.training.optimizer import build_optimizer, describe_muon, learning_rate
from deepvit_train.training.schedule import build_schedule
from deepvit_train.training.schedule_free import ScheduleFreeAverage
from tests.conftest import Command

SMALL = ["model.depth=2", "model.dim=12", "model.heads=3"]


@cache
def composed(*overrides: str) -> TrainConfig:
    return compose_command("train", [*SMALL, *overrides])


def built(config: TrainConfig) -> tuple[DeepViT, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = DeepViT(Architecture(config.model, config.attn), num_classes=4)
    return model, build_optimizer(model, config.optim)


@pytest.mark.parametrize("name", choices("optim"))
def test_rates_and_weight_decay_are_each_parameters_own(name: str) -> None:
    config = composed(f"optim={name}", "optim.layer_decay=0.5", "optim.decay_theta=false")
    model, optimizer = built(config)
    schedule = build_schedule(optimizer, config.schedule, epochs=10, steps_per_epoch=10)
    schedule.step_update(70)
    groups = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    layers = {
        "cls_token": 0,
        "pos_embed": 0,
        "patch_embed": 0,
        "blocks.0": 1,
        "blocks.1": 2,
        "norm": 2,
        "head": 3,
    }
    for parameter_name, parameter in model.named_parameters():
        group = groups[id(parameter)]
        decays = parameter.ndim >= 2 and not parameter_name.endswith(("theta", "cls_token", "pos_embed"))
        assert group["weight_decay"] == (config.optim.weight_decay if decays else 0), parameter_name
        layer = next((layers[begin] for begin in layers if parameter_name.startswith(begin)), 3)  # the head
        assert group["lr"] == pytest.approx(learning_rate(optimizer) * 0.5 ** (3 - layer)), parameter_name


@pytest.mark.parametrize("attn", choices("attn"))
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_muon_has_the_matrices_of_the_blocks_alone(attn: str, layer_decay: float) -> None:
    model, optimizer = built(composed("optim=muon", f"attn={attn}", f"optim.layer_decay={layer_decay}"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    by_muon = {name for name, each in model.named_parameters() if "exp_avg" not in optimizer.state[each]}
    expected = {
        f"blocks.{block}.{part}.weight"
        for block in (0, 1)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert by_muon == expected
    own = dict(model.named_parameters())
    count = sum(own[name].numel() for name in expected)
    rest = sum(each.numel() for each in model.parameters()) - count
    assert describe_muon(optimizer) == (
        f"muon: {count:,} parameters in 8 matrices of the blocks; AdamW: {rest:,} in Theta, tokens, stem, "
        "head, norms and biases"
    )


def test_muon_is_said_of_no_other_optimizer() -> None:
    assert describe_muon(built(composed())[1]) is None


def test_arguments_reach_the_optimizer() -> None:
    _, optimizer = built(composed("optim=lion", "optim.betas=[0.8,0.95]", "optim.options={caution: true}"))
    assert isinstance(optimizer, Lion)
    assert optimizer.defaults["caution"] is True
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    assert built(composed("optim=sgd", "optim.options={momentum: 0.5}"))[1].defaults["nesterov"] is True
    assert built(composed())[1].defaults["fused"] is True


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.name=adamww"], "optim.name=adamww: timm has no such optimizer; did you mean 'adamw'"),
        (["optim.name=schedulefree_adam"], "did you mean 'schedulefree_adamw'"),
        (["optim=sgd", "optim.options={nesterow: true}"], "no such argument; did you mean 'nesterov'"),
        (["optim=sgd", "optim.options={nesterov: 3}"], "must be like False, its default"),
        (["optim=sgd", "optim.options={momentum: much}"], "must be like 0, its default"),
        (["optim=sgd", "optim.options={lr: 1}"], "is a key of its own; nearest: optim.lr=1"),
        (["optim=sgd", "optim.options={momentum: 0}"], "optim.name=sgd .*Nesterov momentum requires"),
        (["optim=sgd", "optim.eps=1e-8"], "optim.eps=1e-08: sgd has none; nearest: optim.eps=null"),
        (["optim=lion", "optim.eps=1e-8"], "optim.eps=1e-08: lion has none"),
        (["optim.name=adan"], r"optim.betas=\[0.9, 0.999\]: adan needs 3 numbers"),
        (["optim=schedulefree", "optim.options={warmup: 3}"], "did you mean 'warmup_steps'"),
        (["optim.name=kron"], "draws random numbers of its own"),
        (["optim.name=fusedadam"], "is of the package apex"),
        (["optim=muon", "optim.options={conv_mode: big}"], "Invalid conv_mode"),
    ],
)
def test_what_an_optimizer_does_not_take_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        built(composed(*overrides))


def test_a_wrong_optimizer_leaves_no_run_behind(call: Command) -> None:
    said = call("train", "optim.name=lyon", "run_dir=run")
    assert said.returncode == 2
    assert said.stderr == "error: optim.name=lyon: timm has no such optimizer; did you mean 'lion'?\n"
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.ema_decay=0.9"], "averages the weights itself; nearest: trainer.ema_decay=null"),
        (["trainer.shard=true"], "needs whole tensors; nearest: trainer.shard=false"),
    ],
)
def test_what_schedule_free_does_not_go_with(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed("optim=schedulefree", *overrides)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "radam"])
def test_the_average_is_that_of_the_package(kind: str) -> None:
    betas = [] if kind != "sgd" else ["optim.betas=null", "optim.eps=null"]
    model, optimizer = built(composed("optim=schedulefree", f"optim.name=schedulefree_{kind}", *betas))
    average = ScheduleFreeAverage(model)
    average.refresh(model, optimizer)
    for one, other in zip(average.module.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)  # before the first step
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    trained = [parameter.clone() for parameter in model.parameters()]
    average.refresh(model, optimizer)
    assert all(torch.equal(one, other) for one, other in zip(trained, model.parameters(), strict=True))
    optimizer.eval()
    for one, other in zip(average.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
