"""Average the weights of several runs: the mean itself, statistics measured anew, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from tests.conftest import QUICK, Command

SHORT = [*QUICK, "trainer.epochs=1", "schedule.warmup_epochs=0.5"]


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in their seeds, one with dropout, and one of another attention."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in {
        "a": [],
        "b": ["seed=1", "model.dropout=0.1"],
        "plain": ["attn=self"],
        "wide": ["model.mlp_ratio=3"],
    }.items():
        train.run(compose_command("train", [*SHORT, *overrides, f"run_dir={folder / name}"]))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def test_the_mean_is_written_with_statistics_of_its_own(call: Command, runs: Path, tmp_path: Path) -> None:
    done = call("convert", f"source={runs / 'a'}", f"average={runs / 'b'}", "out=mean")
    assert done.returncode == 0, done.stderr
    assert "BatchNorm over maps: calibrated on 64 training images" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["average_of"] == 2
    first, second, found = (
        weights(runs / "a"),
        weights(runs / "b"),
        load_file(tmp_path / "mean" / "model.safetensors"),
    )
    assert found.keys() == first.keys()
    measured = [name for name in found if name.endswith(("attn.norm.running_mean", "attn.norm.running_var"))]
    assert len(measured) == 4
    for name, tensor in found.items():
        mean = (first[name].double() + second[name].double()) / 2
        if name in measured:
            assert not torch.allclose(tensor.double(), mean, rtol=1e-3)
        elif tensor.is_floating_point():
            assert torch.equal(tensor, mean.float())
    images = ["data=digits", "threads=1"]
    told = [
        json.loads(call("eval", "checkpoint=mean", *images, *more).stdout.splitlines()[-1])["loss"]
        for more in ([], ["calibrate_images=64"])
    ]
    assert told[0] == pytest.approx(told[1], abs=1e-4)


def test_the_mean_of_one_model_with_itself_is_that_model(call: Command, runs: Path, tmp_path: Path) -> None:
    done = call(
        "convert", f"source={runs / 'plain'}", f"average=[{runs / 'plain'},{runs / 'plain'}]", "out=mean"
    )
    assert done.returncode == 0, done.stderr
    found, expected = load_file(tmp_path / "mean" / "model.safetensors"), weights(runs / "plain")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_models_of_two_kinds_have_no_mean(
    call: Command, runs: Path, image_folder: Path, tmp_path: Path
) -> None:
    small = ["model=digits", "trainer.batch_size=8", f"data.root={image_folder}"]
    train.run(compose_command("train", [*SHORT, *small, f"run_dir={tmp_path / 'ants'}"]))
    for other, said in [
        (runs / "plain", "is a model of another architecture"),
        (runs / "wide", "is a model of another architecture"),
        (tmp_path / "ants", "has other classes than source="),
        (tmp_path / "nowhere", "average="),
    ]:
        refused = call("convert", f"source={runs / 'a'}", f"average={other}", "out=mean")
        assert (refused.returncode, said in " ".join(refused.stderr.split())) == (3, True), refused.stderr
        assert not (tmp_path / "mean").exists()
