"""Distillation through the command: teachers of every kind, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from tests.conftest import QUICK, Command

SHORT = [
    *QUICK[:-2],
    "trainer.epochs=1",
    "trainer.limit_batches=3",
    "schedule.warmup_epochs=0",
    "data.workers=0",
]


@pytest.fixture(scope="module")
def teacher(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another shape and size, to learn from."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    overrides = ["model.image_size=24", "model.dim=24", "model.mean=[0.4,0.4,0.4]", f"run_dir={folder}"]
    train.run(compose_command("train", [*SHORT, *overrides]))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def start(folder: Path, *overrides: str) -> dict[str, Any]:
    return train.run(compose_command("train", [*SHORT, f"run_dir={folder}", *overrides]))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_run_learns_from_a_run(
    kind: str, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (teacher / "checkpoints" / "last" / "model.safetensors").read_bytes()
    start(tmp_path / "alone")
    start(
        tmp_path / "taught", f"distill.teacher={teacher}", f"distill.kind={kind}", "trainer.log_every_steps=1"
    )
    told = " ".join(capsys.readouterr().out.split())
    assert f"reattention, 2 blocks, 24 pixels; 10 outputs; {kind}, 0.5 of the loss" in told
    alone, taught = weights(tmp_path / "alone"), weights(tmp_path / "taught")
    assert alone.keys() == taught.keys()
    assert any(not torch.equal(alone[name], taught[name]) for name in alone)
    assert (teacher / "checkpoints" / "last" / "model.safetensors").read_bytes() == before
    lines = [json.loads(line) for line in (tmp_path / "taught" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line.get("train/distillation", -1) >= 0]) == 3


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(teacher: Path, tmp_path: Path) -> None:
    """Plain attention in evaluation's form: without dropout teacher and student are one function."""
    start(tmp_path / "first", "attn=self")
    file = tmp_path / "first" / "checkpoints" / "last"
    start(
        tmp_path / "second",
        "attn=self",
        f"model.weights={file}",
        f"distill.teacher={file}",
        "distill.share=1",
        "optim.lr=0",
        "schedule.warmup_lr=0",
        "trainer.log_every_steps=1",
    )
    lines = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    found = [line["train/distillation"] for line in lines if "train/distillation" in line]
    assert found == pytest.approx([0, 0, 0], abs=1e-6)


def test_a_model_of_timm_teaches(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "resnet.safetensors")
    start(
        tmp_path / "run",
        "distill.teacher=timm:test_resnet",
        f"distill.file={tmp_path / 'resnet.safetensors'}",
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "teacher: timm's test_resnet" in told
    assert "160 pixels; 10 outputs; soft" in told


def test_a_teacher_of_more_classes_answers_for_those_that_there_are(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["model=digits", "trainer.batch_size=8", "model.image_size=8", f"data.root={image_folder}"]
    start(tmp_path / "three", *small)
    start(tmp_path / "two", *small, "data.classes=[cat,ant]", f"distill.teacher={tmp_path / 'three'}")
    assert "3 outputs, of which 2 are classes here" in " ".join(capsys.readouterr().out.split())


def test_a_run_goes_on_with_its_own_teacher_alone(
    call: Command, teacher: Path, digits: Path, tmp_path: Path
) -> None:
    longer = ["trainer.epochs=2", f"run_dir={tmp_path / 'run'}"]
    first = call("train", *SHORT, f"run_dir={tmp_path / 'run'}", f"distill.teacher={teacher}")
    assert first.returncode == 0, first.stderr
    start(tmp_path / "other", "seed=1")
    for other in ([f"distill.teacher={tmp_path / 'other'}"], []):
        refused = call("train", *SHORT, *longer, *other)
        assert refused.returncode == 3
        assert "is not the model that this run learns from" in refused.stderr
    moved = tmp_path / "moved"
    teacher.rename(moved)
    try:
        again = call("train", *SHORT, *longer, f"distill.teacher={moved}")
    finally:
        moved.rename(teacher)
    assert again.returncode == 0, again.stderr


def test_what_no_teacher_can_be_is_named(call: Command, teacher: Path, tmp_path: Path) -> None:
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), tmp_path / "vit.safetensors")
    resnet = timm.create_model("test_resnet", num_classes=4).state_dict()
    save_file(resnet, tmp_path / "four.safetensors")
    for overrides, code, said in [
        (["distill.teacher=nowhere"], 3, "distill.teacher=nowhere"),
        (["distill.teacher=timm:test_resnot"], 2, "did you mean 'test_resnet'"),
        (["distill.teacher=timm:test_resnet", "distill.file=vit.safetensors"], 3, "does not fit timm's"),
        (
            ["distill.teacher=timm:test_resnet", "distill.file=four.safetensors"],
            4,
            "distill.classes=FILE names",
        ),
        (["distill.teacher=vit.safetensors"], 3, "does not say what its model is"),
        (["distill.file=vit.safetensors"], 2, "distill.teacher=timm:NAME"),
        (["distill.kind=hard"], 2, "there is no teacher"),
        ([f"distill.teacher={teacher}", "distill.share=0"], 2, "distill.share"),
        ([f"distill.teacher={teacher}", "distill.kind=hard", "distill.temperature=2"], 2, "kind=soft"),
    ]:
        refused = call("train", *SHORT, "run_dir=run", *overrides)
        assert (refused.returncode, said in " ".join(refused.stderr.split())) == (code, True), refused.stderr
        assert not (tmp_path / "run").exists()
