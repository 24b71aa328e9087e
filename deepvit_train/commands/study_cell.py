"""Run the cells of a study, each in a process of its own, which saves and ends when the study ends."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

from deepvit_train.atomic import append, open_lock
from deepvit_train.commands import analyze, train
from deepvit_train.config.compose import compose_command
from deepvit_train.console import protect_streams, tell_error
from deepvit_train.error import OutputError, UserError, explained

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class CellProcesses:
    """A context manager that holds a study's folder and runs its cells.

    A stop signal to the study is passed on to its cells, which save and end. A cell also ends, after a save,
    when the study is killed. Until then no other study can begin in the folder.

    Attributes:
        stop: the number of the first stop signal, or 0.
    """

    def __init__(self, out: Path) -> None:
        self.stop = 0
        self._out = out
        self._lock = -1
        self._processes: dict[str, BaseProcess] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> CellProcesses:
        self._lock = _locked(self._out)
        for number in STOPS:
            # nohup has SIGHUP ignored, and a study under it outlives its terminal.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda number, frame: self.pass_on(number))
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes:  # an error ends the study
            self.pass_on(signal.SIGTERM)
            for process in self._processes.values():
                process.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._lock)

    def start(self, name: str, commands: dict[str, list[str]], log: Path) -> None:
        """Begin to train and analyse a cell.

        Args:
            name: the name of the cell.
            commands: the overrides of 'train', and of 'analyze' where it is due.
            log: what the cell prints is added to this file.
        """
        # A server that has already imported torch forks a process for each cell. That saves seconds a cell,
        # and cells share no state.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([__name__])
        arguments = (commands, str(log), list(self._before), DupFd(self._lock))
        process = processes.Process(target=_in_process, args=arguments)
        _start_sheltered(process)
        self._processes[name] = process
        if self.stop:
            self.pass_on(self.stop)  # it came while the process was being started

    def wait(self) -> tuple[str, int]:
        """Wait until a cell has ended. Returns its name and its exit code as a shell gives it."""
        names = {process.sentinel: name for name, process in self._processes.items()}
        name = names[next(one for one in connection.wait(names) if isinstance(one, int))]
        process = self._processes.pop(name)
        process.join()
        code = process.exitcode or 0
        return name, code if code >= 0 else 128 - code

    def pass_on(self, number: int) -> None:
        """Stop every cell by a signal."""
        self.stop = self.stop or number
        for process in list(self._processes.values()):
            if process.pid is not None and process.is_alive():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)


def _locked(out: Path) -> int:
    """Lock a study's folder and return the descriptor. Raises OutputError if another study has locked it."""
    try:
        descriptor = open_lock(out / ".lock")
        try:
            # Unlike a POSIX lock, this one is shared with the cell: its process holds it until it ends.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                told = f"the study of process {holder or '(unknown)'}, or its last cell, is writing there"
                raise OutputError(f"out={out}: {told}") from None
            raise
    except OSError as error:
        raise OutputError(f"out={out}: can't be locked ({error.strerror})") from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor


def _start_sheltered(process: BaseProcess) -> None:
    """Start a process. The server behind it must outlive signals to the whole group, as the cell does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        resource_tracker.ensure_running()  # which lets SIGINT and SIGTERM through again
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_process(commands: dict[str, list[str]], log: str, heeded: list[int], lock: Any) -> None:
    """Train and analyse a cell. Runs in the cell's process, and writes what it prints to the log.

    Args:
        heeded: the stop signals that the study heeds.
        lock: the lock of the study's folder, to be held as long as this process lives.
    """
    for number in STOPS:
        handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, handler if number in heeded else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    lock.detach()
    threading.Thread(target=_end_with_study, daemon=True).start()
    with append(Path(log)) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    protect_streams()
    try:
        with explained("train"):
            train.run(compose_command("train", commands["train"]))
        if "analyze" in commands:
            with explained("analyze"):
                analyze.run(compose_command("analyze", commands["analyze"]))
    except UserError as error:
        tell_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _end_with_study() -> None:
    """Wait until the study has ended, and let this process save and end."""
    study = multiprocessing.parent_process()
    assert study is not None
    study.join()
    os.kill(os.getpid(), signal.SIGTERM)
