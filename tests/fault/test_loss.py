"""End a run at 20 random moments by closing its terminal, and 20 times by a kill: how many steps are lost?"""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepvit_train.cli import main
from tests.conftest import QUICK

pytestmark = [pytest.mark.runs, pytest.mark.slow]

MOMENTS = 20
SAVE_EVERY = 10
RUN = [*QUICK, "trainer.epochs=400", f"trainer.save_every_steps={SAVE_EVERY}", "trainer.log_every_steps=1"]


def on_a_terminal(arguments: list[str]) -> tuple[int, int]:
    """Run a command in a copy of this process, on a terminal of its own. Saves the import of torch."""
    process, terminal = pty.fork()
    if process:
        return process, terminal
    status = 1
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = os.fdopen(number, "w", closefd=False)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        main(arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def steps_done(folder: Path) -> int:
    """The last step that was logged."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    whole = [line for line in lines if line.endswith("}") and '"train/loss"' in line]
    return json.loads(whole[-1])["step"] if whole else 0


def steps_saved(folder: Path) -> int:
    """The step of the newest checkpoint, which the next start goes on from."""
    return max((int(each.name[-7:]) for each in (folder / "checkpoints").glob("step_*")), default=0)


def losses(folder: Path, end: Callable[[int, int], None], exit_code: int) -> list[int]:
    """Start the same command again and again. `end` gets its process and its terminal at a random moment.

    Returns for each start how many steps it had done that its folder does not hold.
    """
    rng, lost = random.Random(exit_code), []
    for _ in range(MOMENTS):
        seen = steps_done(folder)
        process, terminal = on_a_terminal(["train", *RUN, f"run_dir={folder}"])
        moment, deadline = None, time.monotonic() + 120
        while moment is None or time.monotonic() < moment:
            assert time.monotonic() < deadline
            if select.select([terminal], [], [], 0.005)[0]:
                os.read(terminal, 65536)
            if moment is None and steps_done(folder) > seen:
                moment = time.monotonic() + rng.uniform(0, 0.7)
        end(process, terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == exit_code
        lost.append(steps_done(folder) - steps_saved(folder))
    return lost


def test_a_closed_terminal_loses_no_step(digits: Path, tmp_path: Path) -> None:
    lost = losses(tmp_path / "run", lambda process, terminal: os.close(terminal), 128 + signal.SIGHUP)
    print("lost by a closed terminal:", lost)
    assert lost == [0] * MOMENTS


def test_a_kill_loses_the_steps_since_the_last_save(digits: Path, tmp_path: Path) -> None:
    def kill(process: int, terminal: int) -> None:
        os.kill(process, signal.SIGKILL)
        os.close(terminal)

    lost = losses(tmp_path / "run", kill, -signal.SIGKILL)
    print("lost by a kill:", lost)
    # A checkpoint is written beside the steps that follow it.
    assert max(lost) < 2 * SAVE_EVERY
