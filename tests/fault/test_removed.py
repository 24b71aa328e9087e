"""Take the folder from under a run that is being trained: it ends, and writes nothing in its place."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import slowly
from tests.fault.conftest import RUN, content
from tests.fault.test_kill import kill_when, launch, lines_logged

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("removed")]


@pytest.fixture
def living(digits: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A run of the real command that has logged a step, and would go on for minutes."""
    folder = tmp_path / "run"
    process = train_for_long(folder)
    deadline = time.monotonic() + 120
    while lines_logged(folder) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield process, folder
    process.kill()
    process.communicate()


LONG = ["trainer.epochs=400", "trainer.log_every_steps=1", "trainer.save_every_steps=2"]


def train_for_long(folder: Path) -> subprocess.Popen[bytes]:
    return launch("-m", "deepvit_train.cli", "train", *RUN, *LONG, f"run_dir={folder}")


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors.decode()


def test_a_removed_folder_is_never_written_again(
    living: tuple[subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    """The same command begins a new run in its place, which the old process leaves alone."""
    process, folder = living
    os.kill(process.pid, signal.SIGSTOP)  # so that the new run is there before the old one writes again
    shutil.rmtree(folder)
    new = train_for_long(folder)
    kill_when(new, lambda: lines_logged(folder) > 2 and (folder / "checkpoints" / "last").exists())
    before = content(folder)
    os.kill(process.pid, signal.SIGCONT)
    code, said = ended(process)
    assert code == 6, said
    assert "was removed, moved or replaced" in said
    assert content(folder) == before


@pytest.mark.parametrize(
    "what", ["removed", *map(slowly, ["moved", "the lock removed"]), "replaced by an empty folder"]
)
def test_a_folder_that_is_no_longer_the_one_that_was_locked(
    what: str, living: tuple[subprocess.Popen[bytes], Path], tmp_path: Path
) -> None:
    process, folder = living
    os.kill(process.pid, signal.SIGSTOP)
    if what == "the lock removed":
        (folder / ".lock").unlink()
    else:
        folder.rename(tmp_path / "aside")
    if what.startswith("replaced"):
        folder.mkdir()
    os.kill(process.pid, signal.SIGCONT)
    code, said = ended(process)
    assert code == 6, said
    assert "was removed, moved or replaced" in said
    if what == "replaced by an empty folder":
        assert list(folder.iterdir()) == []
    elif what != "the lock removed":
        assert not folder.exists()
