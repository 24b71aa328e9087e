"""Whole runs: which evaluation is the best, and what ends a run before its last step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from tests.conftest import QUICK

# Nothing is learned, so that no evaluation is better than the first.
STILL = ["attn=self", "optim.lr=0", "schedule=constant", "schedule.warmup_lr=0", "trainer.epochs=9"]


def start(folder: Path, *overrides: str) -> dict[str, Any]:
    return train.run(compose_command("train", [*QUICK, f"run_dir={folder}", *overrides]))


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / "last" / "state.json").read_text())


def bits_of(folder: Path) -> dict[str, str]:
    files = sorted((folder / "checkpoints" / "last").glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize(("select_by", "choose"), [("top1", max), ("mean_class", max), ("loss", min)])
def test_the_best_evaluation_is_chosen_by_the_figure(
    select_by: str, choose: Any, tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    start(folder, f"trainer.select_by={select_by}", "trainer.epochs=4", "optim.lr=0.05")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {line["step"]: line[f"val/{select_by}"] for line in lines if "val/top1" in line}
    assert len(figures) == 4
    losses = {line["step"]: line["val/loss"] for line in lines if "val/top1" in line}
    equal = [step for step, figure in figures.items() if figure == choose(figures.values())]
    best = min(equal, key=lambda step: (losses[step], step))
    assert (folder / "checkpoints" / "best").readlink() == Path(f"step_{best:07d}")
    told = f"{choose(figures.values()):.4f}, the {'lowest' if choose is min else 'highest'} of all"
    assert told in " ".join(capsys.readouterr().out.split())


def test_a_run_ends_when_its_patience_does(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, patient = tmp_path / "run", [*STILL, "trainer.patience=2"]
    start(folder, *patient, "trainer.max_steps=12")
    assert state_of(folder)["worse"] == 1
    start(folder, *patient)
    assert state_of(folder)["step"] == 18
    assert "ended by trainer.patience: none of the last 2 evaluations was better" in capsys.readouterr().out
    assert (folder / "result.json").exists()
    start(folder, *patient)
    assert "finished already" in capsys.readouterr().out
    start(folder, *STILL, "trainer.patience=3")
    assert state_of(folder)["step"] == 24


def test_a_run_rests_after_its_hours_and_goes_on_to_the_same_bits(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["trainer.limit_batches=2", "trainer.ema_decay=0.9", "model.dropout=0.1"]
    start(tmp_path / "whole", *short)
    folder = tmp_path / "run"
    for step in (1, 2, 3, 4):
        start(folder, *short, "trainer.max_hours=0.000001")
        said = capsys.readouterr().out
        assert state_of(folder)["step"] == step
        assert (folder / "result.json").exists() == (step == 4)
        assert ("stopped by trainer.max_hours=1e-06" in said) == (step < 4)
    assert bits_of(folder) == bits_of(tmp_path / "whole")
    assert state_of(folder)["hours"] > state_of(tmp_path / "whole")["hours"] == 0


def test_a_finished_run_with_wsd_goes_on_without_a_jump(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, wsd = tmp_path / "run", ["schedule=wsd", "trainer.log_every_steps=1"]
    start(folder, *wsd)
    capsys.readouterr()
    start(folder, *wsd, "trainer.epochs=4", "trainer.max_hours=0.000001")  # one step
    start(folder, *wsd, "trainer.epochs=4")
    assert "the learning rate at step" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["train/lr"] for line in lines if "train/lr" in line]
    assert len(rates) == 24
    # It stood at 0 after step 12. It climbs for the six steps of a warm-up, stands, and decays again.
    assert rates[11] < rates[10]
    assert rates[12:18] == pytest.approx([0.001 * step / 6 for step in range(6)])
    assert rates[18] == pytest.approx(0.001)
    assert rates[-1] < rates[-2] < rates[-3]


def test_weights_of_classes_are_told_and_change_the_training(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["trainer.epochs=1", "schedule.warmup_epochs=0"]
    start(tmp_path / "plain", *short)
    start(tmp_path / "run", *short, "loss.class_weight=balanced")
    assert "class weights (balanced): 0.9" in capsys.readouterr().out
    assert bits_of(tmp_path / "run") != bits_of(tmp_path / "plain")
