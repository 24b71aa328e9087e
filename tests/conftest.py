"""Offer what several tests need: a folder of images, commands run as a user runs them, and a quick run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepvit_train.cli import main
from deepvit_train.data.digits import write_digits

torch.set_num_threads(1)

# A run of seconds: 2 blocks of width 16 on the digits.
QUICK = [
    "model=digits",
    "model.depth=2",
    "model.dim=16",
    "model.heads=2",
    "trainer.threads=1",
    "trainer.batch_size=32",
    "trainer.epochs=2",
    "trainer.limit_batches=6",
    "trainer.calibrate_images=64",
    "trainer.eval_every_epochs=1",
    "trainer.log_every_steps=3",
    "trainer.report=false",
    "schedule.warmup_epochs=1",
    "data.workers=0",
]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded digits in a folder of their own; the commands find them through XDG_CACHE_HOME."""
    cache = tmp_path_factory.mktemp("cache")
    root = cache / "deepvit_train" / "digits-v1"
    root.mkdir(parents=True)
    write_digits(root)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of noise: 3 classes, 8 training and 3 validation images each."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label in ("ant", "bee", "cat"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run a command in this process, in an empty folder: as `command`, without seconds of importing torch."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def command(digits: Path, tmp_path: Path) -> Command:
    """Run `python -m deepvit_train.cli ...` in an empty folder, as a user would."""

    def run(*arguments: str, cwd: Path = tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deepvit_train.cli", *arguments],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)} | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def slowly(*values: object) -> Any:
    """Return values of a parametrised test that run with the slow tests. Others show the same sooner."""
    return pytest.param(*values, marks=pytest.mark.slow)


def forked(*works: Callable[[], object]) -> int:
    """Run functions in copies of this process, at once, and wait: the largest exit status, or minus a signal.

    Saves the seconds that a new process needs to import torch. CPU only, one thread.
    """
    processes = [_fork(work) for work in works]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    return max(statuses, key=abs)


def as_ranks(count: int, *works: Callable[[], object]) -> int:
    """Run functions one after the other as each of so many ranks, as torchrun would start them."""
    ports = [free_port() for _ in works]  # each its own: a group must not meet the one before it

    def as_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        for work, port in zip(works, ports, strict=True):
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work()

    return forked(*[partial(as_rank, rank) for rank in range(count)])


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _fork(work: Callable[[], object]) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
