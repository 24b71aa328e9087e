"""What a log line says of the steps since the line before: loss, speed, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from deepvit_train.distributed.world import World


class Meter:
    """Averages over the steps since the last log line. Losses stay on the device until the next line.

    A run may be stopped between two lines. Then `losses`, the sum of each rank's losses since the last line,
    and `steps`, their number, come from its checkpoint.
    """

    def __init__(self, world: World, losses: Sequence[float] = (), steps: int = 0) -> None:
        self._world = world
        self._reset()
        self._loss_steps = steps
        if len(losses) == world.size:
            self._loss += losses[world.rank]
        elif losses:
            self._loss += sum(losses) / len(losses)  # the run had another number of ranks

    def _reset(self) -> None:
        self._loss = torch.zeros((), device=self._world.device)
        self._loss_steps = self._images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, loss: Tensor, images: int, waited_s: float) -> None:
        """Count a step: its loss, its images over all ranks, and the seconds it waited for them."""
        self._loss += loss
        self._loss_steps += 1
        self._images += images
        self._waited += waited_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the speed, because it is not training.

        Waits for a GPU on both sides, because it may still have steps in its queue.
        """
        self._wait_for_device()
        before = time.perf_counter()
        yield
        self._wait_for_device()
        self._since += time.perf_counter() - before

    def _wait_for_device(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

    def losses(self) -> tuple[list[float], int]:
        """Return the sum of each rank's losses since the last line, and the number of steps.

        Waits for the device.
        """
        return self._world.each(float(self._loss)), self._loss_steps

    def take(self, learning_rate: float, grad_norm: Tensor) -> dict[str, float]:
        """Return the scalars of a log line, with the loss averaged over ranks, and start over.

        Waits for the device.
        """
        loss = float(self._world.sum(self._loss)) / (self._loss_steps * self._world.size)
        passed = time.perf_counter() - self._since
        values = {
            "train/loss": loss,
            "train/lr": learning_rate,
            "train/grad_norm": float(grad_norm),
            "train/images_per_s": self._images / passed,
            "train/data_wait": self._waited / passed,
            "train/memory_mib": memory_mib(self._world.device),
        }
        self._reset()
        return values


def memory_mib(device: torch.device) -> float:
    """Return the most memory used so far, in MiB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
