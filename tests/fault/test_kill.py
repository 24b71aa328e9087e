"""Kill a run at any moment: the run that continues it ends with the bits of a run that was never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.run import checkpoint, saving
from tests.conftest import QUICK, forked
from tests.watch import watching

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("kill")]  # one run that is never stopped serves all

RUN = [
    *QUICK,
    "trainer.ema_decay=0.9",
    "trainer.epochs=4",
    "trainer.save_every_steps=2",
    "trainer.eval_every_epochs=2",
    "trainer.limit_batches=5",
    "trainer.log_every_steps=1",
    "model.dropout=0.1",
]
FILES = ("model", "ema", "optimizer", "calibrated")


def launch(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a Python process that heeds SIGHUP, even if these tests run under nohup."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def finish(*arguments: str) -> None:
    process = launch("-m", "deepvit_train.cli", "train", *arguments)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """SIGKILL the process, and it alone, once the condition holds: its loader processes end by themselves."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, (process.stderr or sys.stderr).read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    if process.stderr:
        process.stderr.close()


def lines_logged(folder: Path) -> int:
    """Lines of training scalars so far."""
    file = folder / "metrics.jsonl"
    return file.read_text().count('"train/loss"') if file.exists() else 0


def outcome(folder: Path) -> dict[str, str]:
    """SHA-256 of all that the last checkpoint holds."""
    last = folder / "checkpoints" / "last"
    files = {name: last / f"{name}.safetensors" for name in FILES}
    assert files["model"].exists()
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.exists()
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    measured = {"train/images_per_s", "train/data_wait", "train/memory_mib"}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(*RUN, f"run_dir={folder}")
    return folder


def test_kills_of_the_real_command_at_random_moments_change_no_bit(whole: Path, tmp_path: Path) -> None:
    overrides = [*RUN, f"run_dir={tmp_path / 'run'}", "data.workers=2"]
    for seen in (0, 4, 9, 13, 17):
        process = launch("-m", "deepvit_train.cli", "train", *overrides)
        kill_when(process, lambda seen=seen: lines_logged(tmp_path / "run") > seen)
        assert process.returncode == -signal.SIGKILL
    finish(*overrides)
    assert outcome(tmp_path / "run") == outcome(whole)
    assert metrics(tmp_path / "run") == metrics(whole)


def kill_at_random_moments(kills: int, overrides: list[str], folder: Path) -> None:
    """Start the run so many times; SIGKILL each start at its next line logged and a moment more."""
    rng = random.Random(kills)
    for _ in range(kills):
        seen = lines_logged(folder)
        process = os.fork()
        if process == 0:
            train.run(compose_command("train", overrides))
            os._exit(0)
        while lines_logged(folder) <= seen and os.waitpid(process, os.WNOHANG)[0] == 0:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        os.kill(process, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_no_bit(digits: Path, kills: int, tmp_path: Path) -> None:
    run = [*RUN, f"trainer.epochs={max(4, kills)}", "trainer.save_every_steps=1"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert forked(lambda: train.run(compose_command("train", [*run, f"run_dir={whole}"]))) == 0
    overrides = [*run, f"run_dir={folder}"]
    kill_at_random_moments(kills, overrides, folder)
    assert forked(lambda: train.run(compose_command("train", overrides))) == 0
    assert outcome(folder) == outcome(whole)
    assert metrics(folder) == metrics(whole)


def dying(moment: int, folder: Path, overrides: list[str]) -> None:
    """Train, and be killed in place of one file operation of the saves, counted from the first."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if done == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*arguments: object, **options: object) -> object:
            count()
            return operation(*arguments, **options)

        return wrapped

    # The interpreter tells of all operations but these two.
    for module, name in ((saving, "save_file"), (os, "fsync")):
        setattr(module, name, counted(getattr(module, name)))
    with watching(folder / "checkpoints", count):
        train.run(compose_command("train", overrides))


def check_a_kill_in_a_save(moment: int, folder: Path, whole: Path) -> None:
    overrides = [*RUN, f"run_dir={folder}"]
    assert forked(lambda: dying(moment, folder, overrides)) == -signal.SIGKILL
    damaged: list[str] = []
    checkpoint.newest_valid(folder / "checkpoints", damaged.append)
    assert damaged == []  # a checkpoint under its own name is always whole
    assert forked(lambda: train.run(compose_command("train", overrides))) == 0
    assert outcome(folder) == outcome(whole)
    assert list((folder / "checkpoints").glob(".partial-*")) == []


# In the first save: between weights files, after the state, before the manifest, before the folder gets its
# name, before and after the new link. In later ones: before the link is moved, and in a deletion.
@pytest.mark.parametrize("moment", [8, 11, 20, 25, 29, 30, 88, 93])
def test_kills_inside_a_save_leave_the_old_or_the_new_checkpoint(
    whole: Path, moment: int, tmp_path: Path
) -> None:
    check_a_kill_in_a_save(moment, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 96))
def test_kills_at_every_operation_of_three_saves(whole: Path, moment: int, tmp_path: Path) -> None:
    check_a_kill_in_a_save(moment, tmp_path / "run", whole)
