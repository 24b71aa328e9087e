"""A plain ViT becomes a DeepViT: its logits stay at first, and a run that finds the block resumes exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deepvit_train.commands import train, train_graft
from deepvit_train.commands.train_graft import Graft, from_block
from deepvit_train.config.compose import compose_command
from deepvit_train.config.model import ThetaInit, ThetaNorm
from deepvit_train.config.preset import Architecture, attention_preset
from deepvit_train.error import ConfigError
from deepvit_train.evaluation.loaded import load
from deepvit_train.models import DeepViT, load_model, record_maps, start_from
from deepvit_train.training.recipe import build_optimizer, learning_rate
from tests.conftest import QUICK, Command

DEEP = ["model.depth=4"]
GRAFTED = [*QUICK, *DEEP, "attn.theta_init=identity", "attn.from_block=auto", "collapse.threshold=0.5"]


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with plain attention."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train.run(compose_command("train", [*QUICK, *DEEP, "attn=self", "optim.lr=0.01", f"run_dir={folder}"]))
    return folder


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("norm", [ThetaNorm.none, ThetaNorm.batch])
@pytest.mark.parametrize("first", [0, 2])
def test_logits_are_the_plain_ones_at_first(plain: Path, norm: ThetaNorm, first: int) -> None:
    """In evaluation with either norm; in training too without one."""
    loaded = load(str(plain), "auto")
    before, shape = loaded.model, loaded.architecture.model
    attn = replace(
        attention_preset("reattention"), norm=norm, theta_init=ThetaInit.identity, from_block=first
    )
    model = DeepViT(Architecture(shape, attn), 10)
    start_from(model, str(plain))
    maps = [record.before.double() for record in record_maps(before, images(16))]
    means, variances = ([f(each.transpose(0, 1).flatten(1)) for each in maps] for f in (_mean, _variance))
    graft = Graft(torch.eye(4), torch.stack(means).float(), torch.stack(variances).float())
    fresh = model.train()(images(3)).detach()
    graft.start_norms(model)
    with torch.no_grad():
        expected = before(images(3))
        torch.testing.assert_close(model.eval()(images(3)), expected, rtol=0, atol=1e-5)
        if norm == ThetaNorm.none:
            torch.testing.assert_close(model.train()(images(3)), expected, rtol=0, atol=1e-5)
        else:  # the batch's own statistics are others; those of a fresh norm are far off
            started = (model.train()(images(3)) - expected).abs().max()
            assert started < 0.3 * (fresh - expected).abs().max()


def _mean(maps: torch.Tensor) -> torch.Tensor:
    return maps.mean(dim=1)


def _variance(maps: torch.Tensor) -> torch.Tensor:
    return maps.var(dim=1, correction=0)


@pytest.mark.parametrize(
    ("near", "block"),
    [
        ([0.1, 0.2, 0.95, 0.96, 0.97], 3),  # unlike, then alike
        ([0.95, 0.1, 0.2, 0.95, 0.96], 4),  # the like block 1 is an exception
        ([0.95, 0.96, 0.95, 0.96, 0.1], 1),
        ([0.1, 0.95, 0.1, 0.1, 0.1], 2),  # a block that is like the one before it is there, so it is that one
        ([0.1, 0.1, 0.1, 0.1, 0.95], 5),
    ],
)
def test_the_block_parts_unlike_ones_from_like_ones(near: list[float], block: int) -> None:
    config = compose_command("train", []).collapse
    assert (config.threshold, config.k) == (0.9, 1)
    assert from_block(torch.diag(torch.tensor(near), -1), config) == block


def test_no_like_block_is_an_error_that_names_the_likest() -> None:
    config = compose_command("train", []).collapse
    with pytest.raises(ConfigError, match=r"nearest: attn\.from_block=2, .* the highest \(0\.80\)"):
        from_block(torch.diag(torch.tensor([0.1, 0.8, 0.3]), -1), config)


def test_the_block_is_that_of_an_analysis_of_the_same_images(call: Command, plain: Path) -> None:
    """Both look at the same training images."""
    options = ["report=false", "collapse.images=64", "threads=1", "data.workers=0", "out=seen"]
    assert call("analyze", f"checkpoint={plain}", "data.split=train", *options).returncode == 0
    analysis = json.loads(Path("seen/analysis.json").read_text())["models"][0]
    more = ["collapse.images=64", f"model.weights={plain}", "attn.norm=none", "trainer.max_steps=1"]
    done = call("train", *GRAFTED, *more, "run_dir=run")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("attn.from_block=auto"))
    said = [float(value) for value in line.rpartition(": ")[2].split(", ")]
    matrix = analysis["trained"]["averages"]["similarity/pre_mix/raw/column"]
    assert said == pytest.approx([matrix[block][block - 1] for block in range(1, 4)], abs=0.0051)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_grafted_run_says_its_block_and_resumes_exactly(
    call: Command, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, norm: str
) -> None:
    options = [*GRAFTED, f"attn.norm={norm}", f"model.weights={plain}", "optim.mixing_rate=3"]
    done = call("train", *options, "run_dir=whole")
    assert done.returncode == 0, done.stderr
    block = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())["attn"]["from_block"]
    assert f"attn.from_block=auto: {block}, from which on" in done.stdout
    assert load_model("whole").attn.from_block == block

    half = call("train", *options, "run_dir=parted", "trainer.max_steps=7")
    assert half.returncode == 0, half.stderr
    # The weights are not needed any more, and nothing is measured again.
    monkeypatch.setattr(train_graft, "_measure", None)
    elsewhere = call("train", *options, "run_dir=other", "resume=parted")
    assert elsewhere.returncode == 0, elsewhere.stderr
    again = call("train", *options, "run_dir=parted")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    files = [
        tmp_path / run / "checkpoints" / "last" / "model.safetensors" for run in ("whole", "parted", "other")
    ]
    whole, parted, other = (load_file(file) for file in files)
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def test_what_can_not_be_found_is_said(call: Command, plain: Path) -> None:
    alone = call("train", *QUICK, "attn.from_block=auto")
    assert alone.returncode == 2
    assert "attn.from_block=auto: the block is found from model.weights=FILE" in alone.stderr
    options = [*QUICK, *DEEP, f"model.weights={plain}", "collapse.threshold=1.0", "attn.norm=none"]
    unlike = call("train", *options, "attn.from_block=auto", "run_dir=run")
    assert unlike.returncode == 2
    assert "no block of model.weights has maps like those before it" in unlike.stderr
    assert not Path("run").exists()


def test_what_mixes_learns_at_its_own_rate(plain: Path) -> None:
    config = compose_command("train", ["optim.mixing_rate=10", "optim.layer_decay=0.5", "model.depth=2"])
    model = DeepViT(Architecture(config.model, config.attn), 10)
    optimizer = build_optimizer(model, config.optim)
    scales = {
        id(parameter): group.get("lr_scale", 1.0)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    for name, scale in found.items():
        if ".attn.theta" in name or ".attn.norm." in name:
            assert scale == 10 * found[name.partition(".attn.")[0] + ".attn.qkv.weight"]
    assert found["head.weight"] == 1.0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert learning_rate(optimizer) == config.optim.lr  # that of the head, which is not the highest now


def test_the_recipe_is_for_any_plain_shape() -> None:
    for model in ("vit_tiny", "vit_base", "deit_small"):
        options = ["experiment=graft", "data.root=photos", f"model={model}", "model.weights=FILE"]
        config = compose_command("train", options)
        assert config.attn.kind == "reattention"
        assert config.attn.from_block is None
        assert (config.attn.theta_init, config.attn.norm) == (ThetaInit.identity, ThetaNorm.none)
    other = compose_command("train", [*options, "attn.from_block=7"])
    assert other.attn.first == 7
