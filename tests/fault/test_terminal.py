"""Take the terminal away, or fill it with hostile names: a run goes on, and nothing it prints steers it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import QUICK, slowly
from tests.fault.test_kill import RUN, lines_logged, outcome

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
TRAIN = [sys.executable, "-m", "deepvit_train.cli", "train"]
pytestmark = pytest.mark.runs


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run whose terminal lasts."""
    folder = tmp_path_factory.mktemp("terminal") / "run"
    done = subprocess.run([*TRAIN, *RUN, f"run_dir={folder}"], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    return folder


def environment(**changes: str) -> dict[str, str]:
    """The environment with the cache folder that the fixture `digits` sets."""
    return os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]} | changes


@pytest.mark.parametrize(
    "streams",
    [
        "2>&1 | head -1",
        slowly("2>&1 | true"),
        slowly("> /dev/full"),
        "> /dev/full 2>&1",
        slowly(">&-"),
        ">&- 2>&- <&-",
    ],
)
def test_a_run_outlives_its_streams(whole: Path, tmp_path: Path, streams: str) -> None:
    command = f'"$@" {streams}; exit ${{PIPESTATUS[0]}}'
    arguments = [*TRAIN, *RUN, "run_dir=run"]
    done = subprocess.run(["bash", "-c", command, "bash", *arguments], cwd=tmp_path, env=environment())
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())
    assert outcome(tmp_path / "run") == outcome(whole)
    # No file of the run got the number of a closed stream, and with it the text that was meant for it.
    for file in (tmp_path / "run").rglob("*.json*"):
        assert "run folder" not in file.read_text()


def on_a_terminal(arguments: list[str], ignored: bool = False) -> tuple[int, int]:
    """Start a command in a session of its own on a terminal. Returns its process and the terminal's far end.

    Args:
        ignored: start it as nohup does.
    """
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execve(arguments[0], arguments, environment(TERM="xterm"))
    return process, terminal


def read_until(terminal: int, word: bytes) -> bytes:
    said = b""
    deadline = time.monotonic() + 120
    while word not in said:
        assert time.monotonic() < deadline
        said += os.read(terminal, 4096)
    return said


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_closed_terminal_saves_and_ends_the_run(digits: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, terminal = on_a_terminal([*TRAIN, *RUN, f"run_dir={folder}"])
    read_until(terminal, b"step 3/")
    os.close(terminal)
    assert ended(process) == 128 + signal.SIGHUP
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == lines_logged(folder)  # nothing is lost
    done = subprocess.run([*TRAIN, *RUN, f"run_dir={folder}"], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert outcome(folder) == outcome(whole)


def test_a_run_under_nohup_outlives_its_terminal(digits: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process, terminal = on_a_terminal([*TRAIN, *RUN, f"run_dir={folder}"], ignored=True)
    read_until(terminal, b"step 2/")
    os.close(terminal)
    assert ended(process) == 0
    assert outcome(folder) == outcome(whole)


CLASSES = ["[red]bee", "été", ":skull:"]
IMAGE = "\x1b[31m\x9b2J\u202e\udcff"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images whose names steer a terminal, or look like rich's markup."""
    root = tmp_path_factory.mktemp("hostile")
    for split in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for image in range(4):
                Image.new("RGB", (32, 32), (30 * number, image, len(split))).save(folder / f"{image}.png")
    (root / "train" / CLASSES[0] / f"{IMAGE}.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize("encoding", ["ascii", slowly("utf-8")])
def test_names_from_files_do_not_steer_the_terminal(
    digits: Path, hostile: Path, tmp_path: Path, encoding: str
) -> None:
    def said(exit_code: int, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "deepvit_train.cli", *arguments],
            cwd=tmp_path,
            env=environment(PYTHONIOENCODING=encoding),
            capture_output=True,
        )
        told = (done.stdout + done.stderr).decode(encoding)
        assert done.returncode == exit_code, told
        assert [letter for letter in told if not letter.isprintable() and letter != "\n"] == []
        return told

    data = ["data=imagefolder", f"data.root={hostile}", "model.image_size=32", "data.max_bad=2"]
    small = ["trainer.batch_size=4", "trainer.eval_batch_size=4", "trainer.calibrate_images=8"]
    shown = "\\x1b[31m\\x9b2J\\u202e\\udcff.png"
    assert shown in said(0, "train", *QUICK, *data, *small, "run_dir=run")
    told = said(0, "eval", "checkpoint=run", "batch_size=4", "threads=1")
    assert "[red]bee" in told
    assert ":skull:" in told
    assert ("été" if encoding == "utf-8" else "\\xe9t\\xe9") in told
    report = json.loads(told.splitlines()[-1])
    (written,) = (tmp_path / "run" / "checkpoints").glob("*.live.val.json")
    assert report["images"] == 12
    assert set(json.loads(written.read_text())["classes"]) == set(CLASSES)
    assert shown in said(4, "data", "check", f"root={hostile}", "timing=false")
