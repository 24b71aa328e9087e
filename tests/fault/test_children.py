"""Stop or kill a study: its cell saves and ends too, and the same command goes on with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import slowly
from tests.fault.test_kill import lines_logged
from tests.fault.test_signal import _alive
from tests.fault.test_terminal import environment, on_a_terminal

pytestmark = pytest.mark.runs

CELL = "reattention-d02-w16-s0"
STUDY = [
    *(sys.executable, "-m", "deepvit_train.cli", "study"),
    *(
        "study.depths=[2]",
        "study.seeds=[0]",
        "study.dim=16",
        "study.widths=[]",
        "study.attentions=[reattention]",
    ),
    "train=[model.image_size=8,model.patch_size=4,model.heads=2,augment=none,trainer.epochs=60,"
    "trainer.batch_size=10,trainer.log_every_steps=1,trainer.eval_every_epochs=60,"
    "schedule.warmup_epochs=0,trainer.calibrate_images=10,data.workers=1]",
    "study.rates=[]",
    *("train_images=40", "val_images=20", "threads=1", "collapse.images=2"),
]


def begun(out: Path, alive: Callable[[], bool], cell: str = CELL) -> None:
    """Wait until the cell has logged some steps."""
    deadline = time.monotonic() + 120
    while lines_logged(out / "runs" / cell) < 5:
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def session(leader: int) -> list[int]:
    """The processes of a session, zombies excepted."""
    deadline = time.monotonic() + 30
    while (found := _alive(leader)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def check_that_nothing_is_lost(digits: Path, out: Path) -> None:
    """Check what a stopped study left behind, and that the same command finishes it."""
    run = out / "runs" / CELL
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == lines_logged(run)
    assert not (out / "cells" / f"{CELL}.json").exists()
    assert not (out / "table.md").exists()
    done = subprocess.run(
        [*STUDY, f"root={digits}", f"out={out}"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"at step {state['step']} of 240" in (out / "cells" / f"{CELL}.log").read_text()
    assert "1 of 1 cells finished; written:" in done.stdout
    assert (out / "table.md").exists()


@pytest.mark.parametrize(
    ("number", "group"),
    [
        slowly(signal.SIGTERM, False),
        slowly(signal.SIGTERM, True),
        slowly(signal.SIGINT, True),
        (signal.SIGKILL, False),
    ],
)
def test_a_stopped_study(digits: Path, tmp_path: Path, number: signal.Signals, group: bool) -> None:
    out = tmp_path / "study"
    process = subprocess.Popen(
        [*STUDY, f"root={digits}", f"out={out}"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    begun(out, lambda: process.poll() is None)
    (os.killpg if group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert errors.decode() == f"cell {CELL} was stopped; the same command continues it\n"
    assert session(process.pid) == []
    check_that_nothing_is_lost(digits, out)


def test_a_stopped_study_of_two_cells_at_a_time(digits: Path, tmp_path: Path) -> None:
    out, cells = tmp_path / "study", sorted(["self-d02-w16-s0", CELL])
    both = ["study.attentions=[self,reattention]", "cells_at_a_time=2"]
    process = subprocess.Popen(
        [*STUDY, *both, f"root={digits}", f"out={out}"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    for cell in cells:
        begun(out, lambda: process.poll() is None, cell)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.decode() == f"cells {', '.join(cells)} were stopped; the same command continues them\n"
    assert session(process.pid) == []
    for run in (out / "runs" / cell for cell in cells):
        state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
        assert state["step"] == lines_logged(run)


@pytest.mark.slow
def test_a_study_whose_terminal_is_closed(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    process, terminal = on_a_terminal([*STUDY, f"root={digits}", f"out={out}"])
    begun(out, lambda: os.waitpid(process, os.WNOHANG)[0] == 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    assert session(process) == []
    check_that_nothing_is_lost(digits, out)
