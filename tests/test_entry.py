"""Run every command under every fault of its surroundings: a line or two, an exit code, no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest

from deepvit_train.cli import main
from deepvit_train.config.command import COMMANDS, keys_of
from deepvit_train.error import explain
from tests.conftest import QUICK, Command, forked
from tests.test_cli import refused

LONG_NAME = "x" * 256
# Each key that holds a path: the command, the other keys that it needs, the key, and the exit code.
PATHS = [
    ("train", [], "run_dir", 6),
    ("train", [], "resume", 3),
    ("train", [], "model.weights", 3),
    ("train", ["data=imagefolder"], "data.root", 4),
    ("train", [], "data.class_map", 4),
    ("train", ["model.weights=none.pt"], "classes", 4),
    ("train", ["-m", "seed=0,1"], "run_dir", 6),
    ("eval", [], "checkpoint", 3),
    ("eval", ["checkpoint=run"], "data.root", 4),
    ("eval", ["checkpoint=run"], "data.class_map", 4),
    ("eval", ["checkpoint=run"], "classes", 4),
    ("convert", ["out=out"], "source", 3),
    ("convert", ["source=run"], "out", 6),
    ("convert", ["source=run", "out=out"], "classes", 4),
    ("convert", ["source=run", "out=out", "average=run"], "data.root", 4),
    ("convert", ["source=run", "out=out", "average=run"], "data.class_map", 4),
    ("predict", ["images=images"], "checkpoint", 3),
    ("predict", ["checkpoint=run"], "images", 4),
    ("predict", ["checkpoint=run", "images=images"], "out", 6),
    ("predict", ["checkpoint=run", "images=images"], "attention", 6),
    ("predict", ["checkpoint=run"], "data.root", 4),
    ("predict", ["checkpoint=run"], "data.class_map", 4),
    ("predict", ["checkpoint=run"], "classes", 4),
    ("export", ["out=out", "format=pt2"], "checkpoint", 3),
    ("export", ["checkpoint=run", "format=pt2"], "out", 6),
    ("export", ["checkpoint=run", "out=out", "format=pt2"], "data.root", 4),
    ("export", ["checkpoint=run", "out=out", "format=pt2"], "data.class_map", 4),
    ("export", ["checkpoint=run", "out=out", "format=pt2"], "classes", 4),
    ("bench", [], "out", 6),
    ("bench", ["vary=model.depth", "values=[1,2]"], "plot", 6),
    ("data check", [], "root", 4),
    ("data check", ["root=images"], "data.class_map", 4),
    ("compare", ["a", "b"], "out", 6),
    ("analyze", [], "checkpoint", 3),
    ("analyze", ["checkpoint=run"], "compare", 3),
    ("analyze", ["checkpoint=run"], "out", 6),
    ("analyze", ["checkpoint=run"], "data.root", 4),
    ("analyze", ["checkpoint=run"], "classes", 4),
    ("study", [], "root", 4),
    ("study", ["root=images"], "out", 6),
    ("data demo", [], "out", 6),
    ("data fashion-mnist", [], "out", 6),
    ("data fashion-mnist", ["out=out"], "source", 4),
]
FAULTS = {
    "unknown user": "~nosuchuser/x",
    "long name": LONG_NAME,
    "long name in a missing folder": f"missing/{LONG_NAME}",
    "long path": "x/" * 3000,
    "links in a circle": "circle",
}


# Each command as it is typed, with what it can't do without.
COMMAND_LINES = {
    "train": ["train"],
    "train -m": ["train", "-m", "seed=0,1"],
    "eval": ["eval", "checkpoint=run"],
    "convert": ["convert", "source=run", "out=out"],
    "predict": ["predict", "checkpoint=run", "images=images"],
    "export": ["export", "checkpoint=run", "out=out", "format=pt2"],
    "bench": ["bench"],
    "data-check": ["data", "check", "root=images"],
    "analyze": ["analyze", "checkpoint=run"],
    "study": ["study", "root=images"],
    "compare": ["compare", "a", "b"],
    "data-demo": ["data", "demo", "out=out"],
    "data-fashion-mnist": ["data", "fashion-mnist", "out=out"],
}


def test_the_tables_name_every_command_and_every_path() -> None:
    assert set(COMMAND_LINES) - {"train -m"} == set(COMMANDS)
    told = {
        (command, key.name)
        for command, schema in COMMANDS.items()
        for key in keys_of(schema)
        if key.name.rpartition(".")[2] in ("root", "class_map", "checkpoint", "source", "out", "plot")
        or key.name in ("images", "attention")
        or key.name in ("run_dir", "resume", "classes", "compare", "model.weights")
    }
    # These are of no use to the command, or one that shares its configuration is in the table.
    without = {("bench", "model.weights"), ("data-check", "model.weights"), ("data-check", "data.root")}
    without |= {("bench", "classes"), ("analyze", "data.class_map")}
    assert told - without == {(command.replace(" ", "-"), key) for command, _, key, _ in PATHS}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("command", "others", "key", "exit_code"), PATHS)
def test_a_path_that_leads_nowhere(
    call: Command, tmp_path: Path, command: str, others: list[str], key: str, exit_code: int, fault: str
) -> None:
    ending = ".png" if key == "plot" else ""
    (tmp_path / f"circle{ending}").symlink_to(f"circle{ending}")
    result = call(*command.split(), *others, f"{key}={FAULTS[fault]}{ending}")
    refused(result, exit_code, f"{key}={FAULTS[fault][:50]}")
    assert len(result.stderr) < 1000
    assert [entry.name for entry in tmp_path.iterdir()] == [f"circle{ending}"]


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_a_working_folder_that_was_removed(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for flags in ([], ["--help"], ["--cfg"]):
        refused(call(*COMMAND_LINES[command], *flags), 6, "the working folder was removed")
    monkeypatch.chdir(tmp_path)  # so that the fixtures find their way back


@pytest.mark.parametrize("letters", ["\udcff", "\x1b[31m", "\u202e"])
@pytest.mark.parametrize("command", COMMAND_LINES)
def test_odd_letters_in_arguments(call: Command, tmp_path: Path, command: str, letters: str) -> None:
    words = COMMAND_LINES[command]
    key = words[-1].partition("=")[0] if "=" in words[-1] else "trainer.epochs"
    values = [f"{key}={letters}"] if letters != "\u202e" else []  # which a name may hold
    for argument in (*values, f"{letters}=1", f"--{letters}", letters):
        result = call(*words, argument)
        assert result.returncode in (2, 3, 4, 6), argument
        refused(result, result.returncode)
        assert result.stderr.replace("\n", "").isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["name", "data.split"])
def test_a_name_of_256_letters(call: Command, tmp_path: Path, name: str) -> None:
    result = call("train", *QUICK, f"{name}={LONG_NAME}")
    refused(result, 6 if name == "name" else 4, LONG_NAME[:200])
    assert list(tmp_path.iterdir()) == []


def test_no_more_threads(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    def work() -> NoReturn:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        main(["train", *QUICK, f"run_dir={tmp_path / 'run'}"])

    assert forked(work) == 1
    told = capfd.readouterr().err
    assert "error: too many processes or threads (can't start new thread)\n" in told
    assert "Traceback" not in told


def test_no_more_processes(call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    refused(call("train", *QUICK, "run_dir=run", "data.workers=1"), 1, "too many processes", "data.workers")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EIO, "Input/output error", "/disk/file"), "/disk/file"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "/tmp"),
        (OSError("AF_UNIX path too long"), "AF_UNIX path too long"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "another process"),
        (OSError(errno.ENFILE, "Too many open files in system"), "ulimit -n"),
    ],
)
def test_every_error_of_the_system_is_told_in_a_line(error: OSError, told: str) -> None:
    explained = str(explain(error, "train"))
    assert told in explained
    assert len(explained.splitlines()) <= 2


@pytest.mark.slow
def test_a_home_and_a_temporary_folder_that_can_not_be_written(image_folder: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    environment |= {"HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere", "PYTHONHASHSEED": "7"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
    small = ["data=imagefolder", f"data.root={image_folder}", "model.image_size=8", "trainer.batch_size=8"]
    for arguments in (
        ["train", *QUICK, *small, "data.workers=1", "run_dir=run"],
        ["eval", "checkpoint=run", "threads=1"],
        ["analyze", "checkpoint=run", "threads=1", "collapse.images=2"],
        ["convert", "source=run", "out=converted"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "deepvit_train.cli", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
