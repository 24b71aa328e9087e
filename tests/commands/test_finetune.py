"""Start from weights: a linear probe, frozen blocks, layer-wise decay, and what takes precedence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepvit_train.commands import evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import Architecture
from deepvit_train.error import CheckpointError
from deepvit_train.models import DeepViT, load_model
from deepvit_train.training.optimizer import build_optimizer, describe_groups, learning_rate
from deepvit_train.training.schedule import build_schedule
from tests.conftest import QUICK

Tensors = dict[str, torch.Tensor]


def start(folder: Path, *overrides: str) -> dict[str, object]:
    return train.run(compose_command("train", [*QUICK, f"run_dir={folder}", *overrides]))


def weights_of(folder: Path, name: str = "model") -> Tensors:
    return load_file(folder / "checkpoints" / "last" / f"{name}.safetensors")


@pytest.fixture(scope="module")
def pretrained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    start(folder, "trainer.limit_batches=20")
    return folder


def test_a_linear_probe_changes_the_head_alone(
    tmp_path: Path, pretrained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "probe"
    options = [f"model.weights={pretrained}", "optim.head_only=true", "trainer.ema_decay=0.9", "seed=1"]
    result = start(folder, *options, "model.dropout=0.1", "model.drop_path=0.1", "trainer.accumulate=2")
    said = capsys.readouterr().out
    assert f"initial weights: {pretrained}" in said
    assert "learning rate: x1 for 170 parameters" in said
    before = load_model(pretrained).state_dict()
    for name in ("model", "ema"):
        after = weights_of(folder, name)
        changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert changed == {"head.weight", "head.bias"}
    # With nothing to calibrate, the checkpoint evaluates by the statistics it was trained with.
    report = evaluate.run(
        compose_command(
            "eval", [f"checkpoint={folder}/checkpoints/last", "threads=1", "limit_batches=6", "weights=live"]
        )
    )
    assert report["top1"] == result["val/top1"]


def test_the_first_blocks_can_be_frozen(tmp_path: Path, pretrained: Path) -> None:
    start(tmp_path / "run", f"model.weights={pretrained}", "optim.freeze_blocks=1", "seed=1")
    before, after = load_model(pretrained).state_dict(), weights_of(tmp_path / "run")
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed} == {"blocks", "norm", "head"}
    assert not [key for key in changed if key.startswith("blocks.0.")]
    assert "blocks.1.attn.norm.running_mean" in changed


def test_a_stopped_run_goes_on_without_its_initial_weights(tmp_path: Path, pretrained: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((pretrained / "checkpoints" / "last" / "model.safetensors").read_bytes())
    options = [f"model.weights={weights}", "optim.layer_decay=0.7", "optim.freeze_blocks=1"]
    start(tmp_path / "whole", *options)
    start(tmp_path / "cut", *options, "trainer.max_steps=4")
    weights.unlink()
    start(tmp_path / "cut", *options)
    whole, cut = weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_bad_weights_file_leaves_no_run_behind(tmp_path: Path, pretrained: Path) -> None:
    for path, message in ((tmp_path / "none.pth", "no such file"), (pretrained, "does not fit the model")):
        with pytest.raises(CheckpointError, match=message):
            start(tmp_path / "run", f"model.weights={path}", "model.depth=3")
        assert not (tmp_path / "run").exists()


def test_layer_decay_gives_each_block_its_rate() -> None:
    config = compose_command(
        "train", ["model.depth=3", "optim.layer_decay=0.5", "optim.lr=0.1", "schedule.warmup_epochs=0"]
    )
    model = DeepViT(Architecture(config.model, config.attn), num_classes=4)
    optimizer = build_optimizer(model, config.optim)
    schedule = build_schedule(optimizer, config.schedule, epochs=10, steps_per_epoch=10)
    rates = {id(each): group for group in optimizer.param_groups for each in group["params"]}
    for at in (0, 50):
        schedule.step_update(at)
        for name, layer in (("pos_embed", 0), ("blocks.0.norm1.bias", 1), ("blocks.2.attn.theta", 3)):
            rate = rates[id(dict(model.named_parameters())[name])]["lr"]
            assert rate == pytest.approx(learning_rate(optimizer) * 0.5 ** (4 - layer))
        assert rates[id(model.head.weight)]["lr"] == learning_rate(optimizer)
    assert rates[id(model.blocks[2].attn.theta)]["weight_decay"] == config.optim.weight_decay
    assert rates[id(model.pos_embed)]["weight_decay"] == 0.0
    head = sum(parameter.numel() for parameter in model.head.parameters())
    told = describe_groups(optimizer)
    assert told.startswith(f"x1 for {head:,}, x0.5 for ")
    assert len(told.split(" for ")) == 6


def test_frozen_parameters_are_in_no_group() -> None:
    config = compose_command("train", ["model.depth=3", "optim.layer_decay=0.5"])
    model = DeepViT(Architecture(config.model, config.attn), num_classes=4)
    model.freeze(blocks=2)
    optimizer = build_optimizer(model, config.optim)
    tuned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    expected = {id(p) for n, p in model.named_parameters() if n.startswith(("blocks.2", "norm", "head"))}
    assert tuned == expected
    model.train()
    assert [block.training for block in model.blocks] == [False, False, True]
    assert not model.patch_embed.training


def test_the_regulariser_is_logged(tmp_path: Path, digits: Path) -> None:
    import json

    start(tmp_path / "run", "loss.cosine_weight=0.1", "loss.cosine_axis=queries", "trainer.accumulate=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    penalties = [line["train/cosine_penalty"] for line in lines if "train/loss" in line]
    assert penalties
    assert all(-0.1 <= penalty <= 0.1 for penalty in penalties)
