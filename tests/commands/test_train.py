"""Train from the seed to the last checkpoint, stopped and continued in every way that is allowed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deepvit_train.commands import train, train_resume
from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import Architecture
from deepvit_train.error import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    NotFiniteError,
    OutputError,
)
from deepvit_train.models import ReAttention
from deepvit_train.models.attention import FORMS
from deepvit_train.run.environment import describe_source
from deepvit_train.training import loop
from tests.conftest import QUICK

FILES = ("model", "ema", "optimizer")


def start(folder: Path, *overrides: str) -> dict[str, object]:
    return train.run(compose_command("train", [*QUICK, f"run_dir={folder}", *overrides]))


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of weights, averaged weights and optimizer of a run's last checkpoint."""
    last = folder / "checkpoints" / "last"
    files = {name: last / f"{name}.safetensors" for name in FILES}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.exists()
    }


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / "last" / "state.json").read_text())


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_logged(folder: Path, name: str) -> list[int]:
    return [line["step"] for line in metrics_of(folder) if name in line]


@pytest.fixture(autouse=True)
def _digits(digits: Path) -> None:
    """Every test here trains on the embedded digits."""


@pytest.mark.runs
def test_a_run_learns_and_leaves_what_it_promises(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = start(
        folder,
        "trainer.epochs=8",
        "trainer.limit_batches=40",
        "trainer.ema_decay=0.9",
        "model.dim=64",
        "optim.lr=2e-3",
    )
    losses = [line["train/loss"] for line in metrics_of(folder) if "train/loss" in line]
    assert losses[-1] < 0.75 * losses[0]
    assert result["val/top1"] > 0.5
    names = {entry.name for entry in folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "result.json", "tb", "checkpoints"} <= names
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "last").resolve().name == "step_0000320"
    assert (checkpoints / "best").exists()
    environment = json.loads((folder / "environment.json").read_text())[0]
    assert {"git", "packages", "device", "threads", "python"} <= set(environment)

    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    shown = {"loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_mib"}
    metrics = {f"{prefix}/{name}" for prefix in ("val", "val_ema") for name in ("top1", "top5", "loss")}
    assert {f"train/{name}" for name in shown} | metrics <= scalars
    assert "train/images" in events.Tags()["images"]
    assert "config/text_summary" in events.Tags()["tensors"]
    assert "final/val/top1" in scalars


@pytest.mark.parametrize("attn", [pytest.param("self", marks=pytest.mark.runs), "reattention"])
@pytest.mark.parametrize(
    "precision", ["fp32", *(pytest.param(name, marks=pytest.mark.runs) for name in ("bf16", "fp16"))]
)
def test_a_stopped_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, attn: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [f"attn={attn}", f"trainer.precision={precision}", "trainer.ema_decay=0.9", "model.dropout=0.1"]
    start(tmp_path / "whole", *same)
    step = loop.train_step

    def interrupting(state: loop.TrainState, *arguments: object, **named: object) -> object:
        result = step(state, *arguments, **named)
        if state.step in (2, 6, 7):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(loop, "train_step", interrupting)
    for stopped_at in (2, 6, 7):
        with pytest.raises(Interrupted, match="SIGTERM") as error:
            start(tmp_path / "stopped", *same)
        assert error.value.exit_code == 143
        assert state_of(tmp_path / "stopped")["step"] == stopped_at
    start(tmp_path / "stopped", *same)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    assert len(digests(tmp_path / "whole")) == 3
    whole, stopped = state_of(tmp_path / "whole"), state_of(tmp_path / "stopped")
    assert whole["identity"].pop("run") != stopped["identity"].pop("run")
    assert whole == stopped
    for name in ("train/loss", "val/top1"):
        steps = steps_logged(tmp_path / "stopped", name)
        assert steps == sorted(set(steps))
    assert steps_logged(tmp_path / "stopped", "val/top1") == [6, 12]


def test_tensorboard_steps_increase_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.train_step

    def crashing(state: loop.TrainState, *arguments: object, **named: object) -> object:
        if state.step == 9:
            raise KeyboardInterrupt  # as if killed: three steps after the last save, one log line lost
        return step(state, *arguments, **named)

    monkeypatch.setattr(loop, "train_step", crashing)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run")
    assert steps_logged(tmp_path / "run", "train/loss") == [3, 6, 9]
    monkeypatch.setattr(loop, "train_step", step)
    start(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    for name in ("train/loss", "val/top1"):
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(set(steps)) == steps_logged(tmp_path / "run", name)


def test_workers_change_neither_order_nor_loss_nor_accuracy(tmp_path: Path) -> None:
    results = []
    for workers in (0, 1, 2):
        folder = tmp_path / str(workers)
        start(folder, f"data.workers={workers}")
        measured = {"train/images_per_s", "train/data_wait", "train/memory_mib"}
        results.append(
            (
                digests(folder),
                [{k: v for k, v in line.items() if k not in measured} for line in metrics_of(folder)],
            )
        )
    assert results[0] == results[1] == results[2]


class Unused(ReAttention):
    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__(architecture, index)
        self.spare = nn.Parameter(torch.zeros(self.heads))


def test_a_first_step_names_what_no_gradient_reaches_and_a_later_start_what_code_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMS, "reattention", Unused)
    options = ["attn=reattention", "optim.freeze_blocks=1"]

    def said(max_steps: int) -> list[str]:
        start(tmp_path / "run", *options, f"trainer.max_steps={max_steps}")
        return capsys.readouterr().out.splitlines()

    warning = "warning: no gradient reaches: blocks.1.attn.spare (1 parameter)"
    first = said(3)
    assert [line for line in first if "no gradient" in line] == [warning]  # block 0 is frozen
    assert first.index(warning) < first.index(next(line for line in first if line.startswith("step 3/")))
    assert not [line for line in first if "changed" in line]

    edited = describe_source() | {"deepvit_train/models/attention.py": "0" * 12}
    for module in (train, train_resume):
        monkeypatch.setattr(module, "describe_source", lambda: edited)
    change = "since step 3: deepvit_train/models/attention.py changed"
    assert change in said(3)  # finished already
    resumed = said(4)
    assert change in resumed
    assert [line for line in resumed if "no gradient" in line] == [warning]
    assert not [line for line in said(4) if "changed" in line]


def test_a_finished_run_says_so_and_trains_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(tmp_path / "run")
    before = digests(tmp_path / "run")
    capsys.readouterr()
    assert start(tmp_path / "run") == first
    said = capsys.readouterr().out.splitlines()
    assert "finished already" in said[-4]
    assert said[-3].startswith("best: step ")
    assert said[-3].endswith(f", the highest of all evaluations: {tmp_path / 'run' / 'checkpoints' / 'best'}")
    assert said[0] == said[-1] == f"run folder: {tmp_path / 'run'}"
    assert digests(tmp_path / "run") == before


def test_a_longer_run_goes_on_and_a_different_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    start(folder)
    before = digests(folder)
    for overrides, key in (
        (["optim.lr=0.5"], "optim.lr=0.001 (now 0.5)"),
        (["trainer.epochs=1", "schedule.warmup_epochs=0"], "trainer.epochs=2 (now 1)"),
        (["seed=7"], "seed=0 (now 7)"),
    ):
        with pytest.raises(ConfigError) as error:
            start(folder, *overrides)
        assert key in str(error.value)
    with pytest.raises(ConfigError, match="resume=never"):
        start(folder, "resume=never")
    assert digests(folder) == before
    start(folder, "trainer.epochs=3", "trainer.log_every_steps=2", "data.workers=1")
    assert state_of(folder)["step"] == 18
    assert "changed since the run began: trainer.epochs=2 (now 3)" in capsys.readouterr().out


def test_a_limit_of_steps_ends_with_an_evaluation_and_can_be_raised(tmp_path: Path) -> None:
    start(tmp_path / "whole")
    start(tmp_path / "cut", "trainer.max_steps=4")
    assert state_of(tmp_path / "cut")["evaluated_step"] == 4
    start(tmp_path / "cut")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "run")
    whole = digests(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last" / "optimizer.safetensors").write_bytes(b"")
    start(tmp_path / "run")
    said = capsys.readouterr().out
    assert "step_0000012/optimizer.safetensors: damaged checkpoint" in said
    assert "resumed from" in said
    assert digests(tmp_path / "run") == whole


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    start(tmp_path / "run", "trainer.epochs=1", "schedule.warmup_epochs=0")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole; to begin anew, move that folder"):
        start(tmp_path / "run", "trainer.epochs=1", "schedule.warmup_epochs=0")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "damaged")
    start(tmp_path / "run", "optim.lr=2e-3")
    assert steps_logged(tmp_path / "run", "train/loss") == [3, 6, 9, 12]


def test_a_first_start_that_failed_may_be_corrected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(loop, "train_step", fail)
        with pytest.raises(MemoryError):
            start(tmp_path / "run", "trainer.batch_size=64")
    start(tmp_path / "run")
    start(tmp_path / "clean")
    assert digests(tmp_path / "run") == digests(tmp_path / "clean")


def test_another_run_can_be_started_from_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "first")
    # Where the first run stopped, whichever of its checkpoints was the best; and in another precision.
    best = tmp_path / "first" / "checkpoints" / "best"
    best.unlink()
    best.symlink_to("step_0000006")
    start(tmp_path / "second", f"resume={tmp_path / 'first'}", "trainer.epochs=3", "trainer.precision=fp16")
    assert "at step 12 of 18" in capsys.readouterr().out
    assert state_of(tmp_path / "second")["step"] == 18


def test_save_every_steps_and_keep_last(tmp_path: Path) -> None:
    start(
        tmp_path / "run", "trainer.save_every_steps=2", "trainer.keep_last=3", "trainer.eval_every_epochs=9"
    )
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept == ["step_0000008", "step_0000010", "step_0000012"]


def test_sigusr1_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.train_step

    def signalling(state: loop.TrainState, *arguments: object, **named: object) -> object:
        result = step(state, *arguments, **named)
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return result

    monkeypatch.setattr(loop, "train_step", signalling)
    start(tmp_path / "run", "trainer.keep_last=9")
    assert (tmp_path / "run" / "checkpoints" / "step_0000004").is_dir()
    assert state_of(tmp_path / "run")["step"] == 12


def test_a_stop_during_an_evaluation_saves_and_the_next_start_begins_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "whole")
    unstopped = train.Validation.__call__

    def stopping(self: train.Validation, state: loop.TrainState) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        return unstopped(self, state)

    monkeypatch.setattr(train.Validation, "__call__", stopping)
    with pytest.raises(Interrupted) as error:
        start(tmp_path / "run")
    assert error.value.exit_code == 130
    assert (state_of(tmp_path / "run")["step"], state_of(tmp_path / "run")["evaluated_step"]) == (6, -1)
    monkeypatch.setattr(train.Validation, "__call__", unstopped)
    start(tmp_path / "run")
    assert steps_logged(tmp_path / "run", "val/top1") == [6, 12]
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_state_that_is_not_finite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = loop.train_step

    def poisoned(state: loop.TrainState, *arguments: object, **named: object) -> object:
        if state.step == 8:
            nan = float("nan")
            state.model.blocks[1].register_forward_hook(lambda module, inputs, output: output * nan)
        return step(state, *arguments, **named)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(
        NotFiniteError,
        match=r"step 9: the loss is nan.*first in blocks\.1; last good checkpoint: .*step_0000008",
    ):
        start(
            tmp_path / "run",
            "trainer.save_every_steps=1",
            "trainer.keep_last=99",
            "trainer.log_every_steps=5",
        )
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert kept[-1] == "step_0000008"


def test_what_was_saved_as_best_is_what_was_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepvit_train.commands import evaluate

    start(tmp_path / "run", "trainer.ema_decay=0.9", "optim.lr=5e-3", "trainer.limit_batches=20")
    assert "(best, by the averaged weights)" in " ".join(capsys.readouterr().out.split())
    best = json.loads((tmp_path / "run" / "checkpoints" / "best" / "state.json").read_text())["best"]
    overrides = ["threads=1", "batch_size=256", "limit_batches=20"]
    for weights, prefix in (("live", "val"), ("ema", "val_ema")):
        config = compose_command("eval", [f"checkpoint={tmp_path / 'run'}", f"weights={weights}", *overrides])
        report = evaluate.run(config)
        for name in ("top1", "top5", "loss"):
            assert report[name] == best[f"{prefix}/{name}"]


def test_unreadable_images_are_counted_and_too_many_stop_the_run(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = image_folder / "train" / "bee" / "3.png"
    broken.write_bytes(b"")
    overrides = ["data=imagefolder", f"data.root={image_folder}", "trainer.batch_size=8", "data.workers=0"]
    start(tmp_path / "run", *overrides)
    assert capsys.readouterr().out.count(f"bad image, replaced by the next one: {broken}") == 1
    assert steps_logged(tmp_path / "run", "train/bad_files")
    told = r"max_bad=0; the last: .*bee/3\.png.*\nsaved .*step_\d+; a higher data\.max_bad goes on"
    with pytest.raises(DataError, match=told):
        start(tmp_path / "strict", *overrides, "data.max_bad=0")
    assert state_of(tmp_path / "strict")["step"] > 0  # no step was lost
    assert state_of(tmp_path / "strict")["bad_files"] == []
    start(tmp_path / "strict", *overrides, "data.max_bad=1")
    assert digests(tmp_path / "strict") == digests(tmp_path / "run")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"holds thesis\.tex but no run"):
        start(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_accumulation_mixup_clipping_and_checkpointing_go_together(tmp_path: Path) -> None:
    result = start(
        tmp_path / "run",
        "trainer.accumulate=2",
        "augment.mixup=0.8",
        "augment.cutmix=1.0",
        "trainer.clip_grad=1.0",
        "trainer.grad_checkpointing=true",
        "model.drop_path=0.1",
        "model.pool=mean",
        "model.stem=rearrange",
    )
    assert torch.tensor(result["val/loss"]).isfinite()


@pytest.mark.runs
@pytest.mark.slow
def test_a_compiled_run_continues_to_the_bit(tmp_path: Path) -> None:
    compiled = ["trainer.compile=true", "attn=reattention"]
    start(tmp_path / "whole", *compiled)
    start(tmp_path / "cut", *compiled, "trainer.max_steps=5")
    start(tmp_path / "cut", *compiled)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@pytest.mark.slow
def test_every_run_of_a_process_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    compile_model = torch.compile

    def noting(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_model(model, backend=noting))
    with torch._dynamo.config.patch(recompile_limit=2):
        for number in range(3):
            start(tmp_path / str(number), "trainer.compile=true", "trainer.max_steps=1")
            assert len(compiled) == number + 1


@pytest.mark.parametrize("attn", ["self", "reattention", "reattention_vit_pytorch", "talking_heads"])
def test_deterministic_kernels_are_asked_for_and_change_no_bit_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attn: str
) -> None:
    seen = []
    step = loop.train_step

    def noting(*arguments: Any, **options: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", noting)
    run = [f"attn={attn}", "trainer.ema_decay=0.9", "loss.cosine_weight=0.1", "model.drop_path=0.1"]
    start(tmp_path / "plain", *run)
    start(tmp_path / "asked", *run, "trainer.deterministic=true")
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2)
    assert not torch.are_deterministic_algorithms_enabled()
    assert digests(tmp_path / "asked") == digests(tmp_path / "plain")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attn", ["self", "reattention", "reattention_vit_pytorch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_repeats_itself_to_the_bit(tmp_path: Path, precision: str, attn: str) -> None:
    run = [f"attn={attn}", f"trainer.precision={precision}", "trainer.deterministic=true"]
    run += ["trainer.device=cuda", "trainer.ema_decay=0.9", "trainer.save_every_steps=3"]
    start(tmp_path / "whole", *run)
    start(tmp_path / "cut", *run, "trainer.max_steps=5")
    start(tmp_path / "cut", *run)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_learns_what_the_cpu_learns(tmp_path: Path, precision: str) -> None:
    longer = ["trainer.epochs=8", "trainer.limit_batches=40", "model.dim=64", "optim.lr=2e-3"]
    on_cpu = start(tmp_path / "cpu", *longer, "trainer.device=cpu")
    on_gpu = start(tmp_path / "gpu", *longer, "trainer.device=cuda", f"trainer.precision={precision}")
    assert on_gpu["val/top1"] == pytest.approx(on_cpu["val/top1"], abs=0.1)
