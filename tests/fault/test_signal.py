"""Send stop signals at every stage of a run: it saves once and exits with the right code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from deepvit_train.training import interruption
from tests.conftest import QUICK, Command
from tests.fault.test_kill import launch, lines_logged

LONG = [*QUICK, "trainer.epochs=400", "trainer.log_every_steps=1", "trainer.eval_every_epochs=50"]


def wait_for(process: subprocess.Popen[Any], folder: Path, lines: int) -> None:
    """Wait until a run has logged so many steps."""
    deadline = time.monotonic() + 120
    while lines_logged(folder) < lines:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.runs
@pytest.mark.parametrize(
    ("number", "group", "exit_code"),
    [
        (signal.SIGTERM, False, 143),
        (signal.SIGINT, True, 130),
        (signal.SIGTERM, True, 143),
        (signal.SIGHUP, True, 129),
    ],
)
def test_a_doubled_signal_saves_once_and_ends_with_its_code(
    digits: Path, tmp_path: Path, number: int, group: bool, exit_code: int
) -> None:
    folder = tmp_path / "run"
    process = launch("-m", "deepvit_train.cli", "train", *LONG, f"run_dir={folder}", "data.workers=2")
    wait_for(process, folder, 3)
    for _ in range(2):
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors.decode()
    assert b"Traceback" not in errors
    assert b"the same command goes on" in errors
    (saved,) = (folder / "checkpoints").glob("step_*")
    step = json.loads((saved / "state.json").read_text())["step"]
    assert step == lines_logged(folder)


@pytest.mark.parametrize(("ignored", "stop"), [(False, signal.SIGHUP), (True, 0)])
def test_a_closed_terminal_stops_a_run_unless_nohup_holds_it_back(ignored: bool, stop: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with interruption.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.stop == stop
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.runs
def test_the_main_process_killed_leaves_no_loader_process_and_no_shared_memory(
    digits: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = launch("-m", "deepvit_train.cli", "train", *LONG, f"run_dir={folder}", "data.workers=2")
    wait_for(process, folder, 2)
    members = _alive(process.pid)
    assert len(members) >= 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _alive(process.pid) == []
    # torch puts the process's number into the name.
    assert [file for pid in members for file in Path("/dev/shm").glob(f"torch_{pid}_*")] == []


@pytest.mark.runs
def test_a_killed_loader_process_ends_the_run_with_a_hint(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch("-m", "deepvit_train.cli", "train", *LONG, f"run_dir={folder}", "data.workers=1")
    wait_for(process, folder, 2)
    (worker,) = [pid for pid in _alive(process.pid) if pid != process.pid]
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"a loader process died" in errors
    assert b"lower data.workers" in errors
    assert b"; saved " in errors
    assert b"Traceback" not in errors
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == lines_logged(folder)  # no step was lost


def _alive(group: int) -> list[int]:
    """The processes of a process group, zombies excepted."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scontrol that writes down its arguments."""
    tool, said = tmp_path / "bin" / "scontrol", tmp_path / "said"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {said}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    return said


def test_a_stopped_job_is_queued_again(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert interruption.requeue() == "requeued as job 4711"
    assert scontrol.read_text().splitlines() == ["requeue", "4711"]


@pytest.mark.parametrize("job", ["", "1; touch SENTINEL", "$(touch SENTINEL)", "-1", "1\n2", "٣", "1" * 40])
def test_a_hostile_job_id_reaches_nothing(
    scontrol: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    assert interruption.requeue().startswith("not requeued")
    assert not scontrol.exists()
    assert not (tmp_path / "SENTINEL").exists()


def test_a_run_stopped_under_slurm_saves_and_asks(
    scontrol: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Command
) -> None:
    from deepvit_train.training import loop

    monkeypatch.setenv("SLURM_JOB_ID", "12")
    step = loop.train_step

    def stopping(*arguments: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", stopping)
    result = call("train", *QUICK, "run_dir=run", "trainer.requeue=true")
    assert result.returncode == 143
    assert "requeued as job 12" in result.stdout
    assert (tmp_path / "run" / "checkpoints" / "step_0000001").is_dir()


@pytest.mark.runs
@pytest.mark.slow
def test_many_launches_on_one_folder_leave_one_writer(digits: Path, tmp_path: Path) -> None:
    command = ["-m", "deepvit_train.cli", "train", *QUICK, f"run_dir={tmp_path / 'run'}"]
    processes = [launch(*command) for _ in range(20)]
    codes = []
    for process in processes:
        _, errors = process.communicate(timeout=900)
        codes.append(process.returncode)
        if process.returncode == 6:
            assert b"is writing there" in errors
    # One trains; the others are refused, or came when it had finished.
    assert set(codes) <= {0, 6}
    assert 0 in codes
