"""Stop signals. They are noted when they come, and the loop acts on them between two steps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from operator import length_hint
from types import FrameType

from deepvit_train.data.dataset import Batch
from deepvit_train.data.patience import DataLost, LoaderLost, WaitInterrupted
from deepvit_train.distributed.world import World
from deepvit_train.error import Interrupted, UserError

OF_ANOTHER_RANK = "another rank can't read its images; it says why"


class EvaluationStopped(Exception):
    """A stop signal came while an evaluation was under way."""


class StopSignals:
    """A context manager that notes signals.

    SIGINT, SIGTERM and SIGHUP ask for a save and a stop, SIGUSR1 for a save alone. Outside the main thread no
    signal is noted, because Python allows no handler there.
    """

    def __init__(self) -> None:
        self.stop = 0  # the number of the first stop signal
        self.save = False
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> StopSignals:
        in_main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) if in_main else ():
            # nohup has SIGHUP ignored, and a run under it outlives its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """Return the number of the first stop signal, or SIGUSR1 if a save is asked for, or 0."""
        return self.stop or (signal.SIGUSR1 if self.save else 0)

    def take_save(self) -> bool:
        """Return whether a save was asked for since the last call."""
        asked, self.save = self.save, False
        return asked

    def watch(self, batches: Iterable[Batch], world: World) -> Iterable[Batch]:
        """Pass on the batches of an evaluation. Raises EvaluationStopped when a stop signal came to any rank.

        All ranks must read to the end. Some may have fewer batches than others.
        """
        return _Watched(batches, self, world)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        else:
            self.stop = self.stop or number


class _Watched:
    def __init__(self, batches: Iterable[Batch], signals: StopSignals, world: World) -> None:
        self._batches = batches
        self._signals = signals
        self._world = world

    def __length_hint__(self) -> int:
        return length_hint(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        while True:
            batch, failure = self._next(batches)
            stopped = isinstance(failure, WaitInterrupted)
            stop, stops, fails, more = self._world.largest(
                self._signals.stop, stopped, failure is not None and not stopped, batch is not None
            )
            if fails:
                raise failure if isinstance(failure, (DataLost, LoaderLost)) else DataLost(OF_ANOTHER_RANK)
            if stops or (stop and more):
                raise EvaluationStopped
            if not more:
                return
            if batch is not None:
                yield batch

    def _next(self, batches: Iterator[Batch]) -> tuple[Batch | None, UserError | None]:
        """Wait for the next batch; None at the end. What ends the wait is returned, for all ranks to know."""
        try:
            return next(batches, None), None
        except (WaitInterrupted, DataLost, LoaderLost) as failure:
            return None, failure


def receive(
    batches: Iterator[Batch], count: int, signals: StopSignals, world: World, save: Callable[[], None]
) -> list[Batch]:
    """Wait for `count` batches. Every rank must call it.

    SIGUSR1 saves while it waits. Where a stop signal comes to a rank that waits, or its images or a loader
    process are lost, all ranks save. Then it raises WaitInterrupted on every rank; or else DataLost, and on a
    rank that lost a loader process LoaderLost.
    """
    received: list[Batch] = []
    failure: UserError | None = None
    while len(received) < count and failure is None:
        try:
            received.append(next(batches))
        except WaitInterrupted as error:
            if signals.stop:
                failure = error
            elif signals.take_save():
                save()
        except (DataLost, LoaderLost) as error:
            failure = error
    stops = isinstance(failure, WaitInterrupted)
    fails = failure is not None and not stops
    if world.size > 1:
        # The others would wait in the step for a rank that takes no part in it.
        stops, fails = map(bool, world.largest(stops, fails))
    if stops or fails:
        save()
        if fails:
            raise failure if isinstance(failure, (DataLost, LoaderLost)) else DataLost(OF_ANOTHER_RANK)
        raise failure or WaitInterrupted("another rank", signals.stop)
    return received


def interrupted(number: int, saved: object) -> Interrupted:
    """Return the error that ends a run after a stop signal. `saved` names its last checkpoint."""
    return Interrupted(
        f"stopped by {signal.Signals(number).name}; saved {saved}; the same command goes on", number
    )


def requeue() -> str:
    """Ask SLURM to queue this process's job again. Returns a line that says how it went."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # No shell sees this text, but scontrol does: pass nothing but the number of a job.
    if not re.fullmatch(r"[0-9]{1,12}", job):
        return f"not requeued: SLURM_JOB_ID={job!r} is not the number of a job"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except OSError as error:
        return f"not requeued: scontrol can't be run ({error.strerror})"
    except subprocess.CalledProcessError as error:
        return f"not requeued: scontrol said {error.stderr.strip() or error.returncode}"
    except subprocess.TimeoutExpired:
        return "not requeued: scontrol did not answer in 60 s"
    return f"requeued as job {job}"
