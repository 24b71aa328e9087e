"""Load batches in loader processes, and normalise and erase them on the device, one batch ahead."""

from __future__ import annotations

import atexit
import ctypes
import signal
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import popen_fork, process
from multiprocessing.context import ForkContext, ForkProcess

import torch
from torch.utils.data import DataLoader, get_worker_info

from deepvit_train.data.dataset import Batch, ImageDataset, RawBatch
from deepvit_train.data.memory import ReusedMemory
from deepvit_train.data.order import EvalOrder, TrainOrder
from deepvit_train.data.patience import POLL_S, Patience, Readers, Wait
from deepvit_train.data.shared import SharedBlocks
from deepvit_train.data.source import GRACE_S, Source, end_processes, open_source
from deepvit_train.data.transform import normalise


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader needs besides data and order. It changes no batch."""

    workers: int
    device: torch.device


PR_SET_PDEATHSIG = 1  # of prctl(2): the signal that a process gets when its parent dies
KEPT_BATCHES = 3  # the batch of a step, the next one, and one that somebody keeps
BLOCKS_A_WORKER = 3  # two batches ahead, which is DataLoader's default, and one that is being read

_open: weakref.WeakSet[Loader] = weakref.WeakSet()


class Loader:
    """Gives batches on the device in a given order, each time it is iterated over.

    On CUDA the next batch is copied and normalised on a stream of its own while the model works on this one.

    Args:
        dataset: gives the pixels of whole batches.
        order: which images each batch has.
        options: the number of processes, and the device.
        mean, std: of each colour channel, for values in 0..1.
        patience: who may interrupt a wait for a batch, and who is told of it.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        order: TrainOrder | EvalOrder,
        options: LoaderOptions,
        mean: Sequence[float],
        std: Sequence[float],
        patience: Patience | None = None,
    ) -> None:
        self.dataset, self.patience = dataset, patience or Patience()
        self.readers = dataset.readers = Readers(max(1, options.workers))
        self.device = options.device
        self.mean, self.std = torch.tensor(mean, device=self.device), torch.tensor(std, device=self.device)
        self.noise = torch.Generator(self.device)
        self.memory = ReusedMemory(KEPT_BATCHES)
        self.shared: SharedBlocks | None = None
        if options.workers:
            size = order.largest_batch * 3 * dataset.transform.size**2
            self.shared = SharedBlocks(options.workers, BLOCKS_A_WORKER, size)
        self.raw: DataLoader[RawBatch] = DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=options.workers,
            collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType] - the dataset gives whole batches
            pin_memory=self.device.type == "cuda",
            persistent_workers=options.workers > 0,
            # Forked processes share the index and the modules instead of copying them
            # (docs/decisions/0010-loader-processes.md).
            multiprocessing_context=_LoaderContext() if options.workers else None,
            worker_init_fn=partial(_begin, self.shared),
            # DataLoader draws a base seed. From torch's generator that would change the draws that follow.
            generator=torch.Generator(),
        )
        self.sources: weakref.WeakSet[Source] = weakref.WeakSet()
        _open.add(self)

    def source(self) -> Source:
        """Begin to read."""
        source = open_source(self.raw, self.device)
        self.sources.add(source)
        return source

    def close(self) -> None:
        """End what reads: processes, of which those that hang are killed, or a thread."""
        end_processes(self.raw, self.readers)
        for source in list(self.sources):
            source.end()

    def __len__(self) -> int:
        return len(self.raw)

    def __iter__(self) -> Iterator[Batch]:
        # The source begins here, before the first batch, so that the processes begin while the model is still
        # being prepared.
        return _Batches(self)

    def prepare(self, raw: RawBatch) -> Batch:
        """Copy a batch to the device, normalise it, and erase boxes with noise from each sample's seed."""
        pixels = raw.pixels.to(self.device, non_blocking=True)
        out = self.memory.empty(pixels.shape, torch.float32) if self.device.type == "cpu" else None
        images = normalise(pixels, self.mean, self.std, out)
        for image, (top, left, height, width, seed) in zip(images, raw.erase.tolist(), strict=True):
            if height:
                self.noise.manual_seed(seed)
                noise = torch.randn(3, height, width, generator=self.noise, device=self.device)
                image[:, top : top + height, left : left + width] = noise
        targets = torch.from_numpy(raw.targets)
        return Batch(images, targets.to(self.device, non_blocking=True), raw.bad)


class _Batches:
    """The batches of one pass over a loader. Who is interrupted while waiting can ask for the batch again."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._source = loader.source()
        self._ahead: tuple[Batch, torch.Event] | None = None  # on CUDA
        self._stream = torch.cuda.Stream(loader.device) if loader.device.type == "cuda" else None
        self._raw_left = True

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            raw = self._take()
            if raw is None:
                raise StopIteration
            return self._loader.prepare(raw)
        while True:
            raw, ready = self._take(), self._ahead
            self._ahead = None
            if raw is not None:
                with torch.cuda.stream(self._stream):
                    self._ahead = self._loader.prepare(raw), self._stream.record_event()
            elif ready is None:
                raise StopIteration
            if ready is not None:
                return _received(*ready)

    def _take(self) -> RawBatch | None:
        """Wait for the next batch; None at the end. Raises WaitInterrupted, DataLost."""
        loader = self._loader
        if not self._raw_left:
            return None
        wait = Wait(loader.patience, loader.readers, loader.dataset.index)
        try:
            while (batch := self._source.take(POLL_S)) is None:
                wait.poll()
        except StopIteration:
            self._raw_left = False
            if loader.shared is not None:
                loader.shared.give_back()
            return None
        wait.over()
        return batch


def _received(batch: Batch, ready: torch.Event) -> Batch:
    """Let the current stream use a batch of another one. Its memory is kept until both are done with it."""
    current = torch.cuda.current_stream(batch.images.device)
    current.wait_event(ready)
    batch.images.record_stream(current)
    batch.targets.record_stream(current)
    return batch


def _as_it_is(batch: RawBatch) -> RawBatch:
    return batch


def _begin(shared: SharedBlocks | None, worker: int) -> None:
    """Prepare a loader process before its first batch."""
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, ImageDataset)
    info.dataset.shared, info.dataset.reader = shared, worker
    # A process that hangs in a file never looks whether the main process still lives.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A stop signal to the whole process group must not end the loaders before the main process has saved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def loaders_closed() -> Iterator[None]:
    """Close the loaders that are made inside. An error that leaves would keep them open, by its traceback."""
    before = set(_open)
    try:
        yield
    finally:
        for loader in set(_open) - before:
            loader.close()


@atexit.register
def _close_all() -> None:
    # Python would end the processes that are left by SIGTERM, which these ignore.
    for loader in list(_open):
        loader.close()


class _Killed(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        # At its exit Python waits for every process without a limit. One that is in a read which the system
        # does not interrupt would keep it, even killed.
        return super().wait(GRACE_S if timeout is None else timeout)


class _LoaderProcess(ForkProcess):
    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> popen_fork.Popen:
        return _Killed(process_obj)


class _LoaderContext(ForkContext):
    """Forks processes that are ended by SIGKILL, because they ignore the SIGTERM of torch and Python.

    This is needed for a loader that was not closed in order: its queues may be gone before its processes are
    told to end.
    """

    Process = _LoaderProcess
