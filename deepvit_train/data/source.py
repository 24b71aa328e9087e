"""Take batches from torch's DataLoader without waiting for longer than was asked.

Without loader processes a batch is read in a thread, because a signal reaches a program only between two
operations of its main thread, and one operation may be to read a file that never comes.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Iterator
from queue import Empty, Queue, SimpleQueue
from threading import Thread
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from deepvit_train.data.dataset import RawBatch
from deepvit_train.data.patience import LoaderLost, Readers
from deepvit_train.error import explain

GRACE_S = 1.0  # for readers to end by themselves


class Source(Protocol):
    """Batches, one after the other."""

    def take(self, timeout_s: float) -> RawBatch | None:
        """Return the next batch, or None if it does not come in time.

        Raises StopIteration at the end, LoaderLost where a loader process died.
        """
        ...

    def end(self) -> None:
        """End the thread that reads, if there is one and it does not hang."""
        ...


def open_source(loader: DataLoader[RawBatch], device: torch.device) -> Source:
    """Begin to read the batches of a DataLoader."""
    return ProcessSource(loader) if loader.num_workers else ThreadSource(iter(loader), device)


_threads: weakref.WeakSet[ThreadSource] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    # A thread that still runs Python while Python ends can take the program down with it.
    for source in list(_threads):
        source.end()


class ProcessSource:
    """Batches of loader processes."""

    def __init__(self, loader: DataLoader[RawBatch]) -> None:
        # Not DataLoader's own timeout, because that would also limit how long its processes take to begin.
        if loader._iterator is not None:
            loader._iterator._timeout = 0
        self._batches: Any = iter(loader)
        # torch would raise at the death of a process wherever the program is, in the middle of a step too.
        # Without its list it raises only here, in take, when a batch does not come.
        if self._batches._worker_pids_set:
            _remove_worker_pids(id(self._batches))
            self._batches._worker_pids_set = False

    def take(self, timeout_s: float) -> RawBatch | None:
        self._batches._timeout = timeout_s
        try:
            return next(self._batches)
        except RuntimeError as error:
            # Nothing was taken, so the same batch can be asked for again.
            if str(error).startswith("DataLoader timed out after"):
                return None
            if (lost := explain(error, "train")) is not None:
                raise LoaderLost(str(lost)) from None
            raise

    def end(self) -> None:
        pass  # the processes are the DataLoader's: end_processes


def end_processes(loader: DataLoader[RawBatch], readers: Readers) -> None:
    """End the loader processes. Those that still read after GRACE_S are killed."""
    batches: Any = loader._iterator
    if batches is None or batches._shutdown:
        return
    batches._workers_done_event.set()  # each leaves out what it has not begun
    deadline = time.monotonic() + GRACE_S
    while (reading := [batches._workers[one] for one in readers.busy()]) and time.monotonic() < deadline:
        if not any(one.is_alive() for one in reading):
            break
        time.sleep(0.01)
    for one in reading:
        one.kill()
    batches._shutdown_workers()


class ThreadSource:
    """Batches that a thread reads, each when it is asked for. The main thread does nothing else meanwhile."""

    def __init__(self, batches: Iterator[RawBatch], device: torch.device) -> None:
        self._asked: SimpleQueue[bool] = SimpleQueue()
        # No SimpleQueue: in Python 3.11 its get() waits for ever if a signal comes just when its time is up.
        self._read: Queue[RawBatch | BaseException] = Queue()
        self._busy = False
        # A daemon, so that the program can end while the thread hangs.
        self._thread = Thread(target=_work, args=(batches, device, self._asked, self._read), daemon=True)
        self._thread.start()
        weakref.finalize(self, self._asked.put, False).atexit = False
        _threads.add(self)

    def end(self) -> None:
        self._asked.put(False)
        self._thread.join(GRACE_S)

    def take(self, timeout_s: float) -> RawBatch | None:
        if not self._busy:
            self._busy = True
            self._asked.put(True)
        try:
            found = self._read.get(timeout=timeout_s)
        except Empty:
            return None
        self._busy = False
        try:
            if isinstance(found, BaseException):
                raise found
            return found
        finally:
            del found  # an error and the frame that raised it would keep each other


def _work(
    batches: Iterator[RawBatch],
    device: torch.device,
    asked: SimpleQueue[bool],
    read: Queue[RawBatch | BaseException],
) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread begins on the first GPU, and pins memory there
    while asked.get():
        try:
            read.put(next(batches))
        except BaseException as error:
            read.put(error)
