"""Offer the runs that several tests do harm to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from tests.conftest import QUICK, Command, forked

RUN = [*QUICK, "trainer.ema_decay=0.9", "trainer.save_every_steps=3", "trainer.keep_last=9"]
STEPS = ["step_0000003", "step_0000006", "step_0000009", "step_0000012"]


@pytest.fixture(scope="session")
def three_runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs: two of one configuration, one of another seed."""
    folder = tmp_path_factory.mktemp("three")
    for name, more in (("a", []), ("twin", []), ("seed", ["seed=1"])):
        run = compose_command("train", [*RUN, f"run_dir={folder / name}", *more])
        assert forked(lambda run=run: train.run(run)) == 0
    return folder


@pytest.fixture
def runs(three_runs: Path, call: Command, tmp_path: Path) -> Path:
    """Copies of them in the working folder."""
    for run in three_runs.iterdir():
        shutil.copytree(run, tmp_path / run.name, symlinks=True)
    return tmp_path


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file and link of a run, apart from its lock."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if (path.is_symlink() or path.is_file()) and path.name != ".lock"
    }
