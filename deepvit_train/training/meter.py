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

    A run may be stopped between two lines. Then `losses` and `plain_losses`, the sums of each rank's losses
    since the last line, and `steps`, their number, come from its checkpoint.
    """

    def __init__(
        self,
        world: World,
        losses: Sequence[float] = (),
        steps: int = 0,
        plain_losses: Sequence[float] = (),
    ) -> None:
        self._world = world
        self._began, self._paused_s = time.perf_counter(), 0.0
        self._reset()
        self._loss_steps = steps
        self._plain_steps = steps if plain_losses else 0  # earlier versions kept none
        self._loss += self._own(losses)
        self._plain += self._own(plain_losses)

    def _own(self, sums: Sequence[float]) -> float:
        """Return this rank's sum, or the mean one if the run had another number of ranks."""
        if len(sums) == self._world.size:
            return sums[self._world.rank]
        return sum(sums) / len(sums) if sums else 0.0

    def _reset(self) -> None:
        self._loss, self._plain = torch.zeros(2, device=self._world.device)
        self._loss_steps = self._plain_steps = self._images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, loss: Tensor, images: int, waited_s: float, plain_loss: Tensor | None = None) -> None:
        """Count a step: its loss, its images over all ranks, and the seconds it waited for them.

        Args:
            plain_loss: the loss without smoothing and penalty, where it is another one.
        """
        self._loss += loss
        self._loss_steps += 1
        if plain_loss is not None:
            self._plain += plain_loss
            self._plain_steps += 1
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
        paused_s = time.perf_counter() - before
        self._since += paused_s
        self._paused_s += paused_s

    def seconds(self, wait: bool = False) -> float:
        """Return the seconds since this meter was made, without those of pauses.

        Args:
            wait: wait for a GPU before, which may still have steps in its queue.
        """
        if wait:
            self._wait_for_device()
        return time.perf_counter() - self._began - self._paused_s

    def _wait_for_device(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)

    def losses(self) -> tuple[list[float], int, list[float]]:
        """Return what __init__ takes: sums of each rank's losses since the last line, and their number.

        Waits for the device.
        """
        plain = self._world.each(float(self._plain)) if self._plain_steps else []
        return self._world.each(float(self._loss)), self._loss_steps, plain

    def take(self, learning_rate: float, grad_norm: Tensor) -> dict[str, float]:
        """Return the scalars of a log line, with the loss averaged over ranks, and start over.

        Waits for the device.
        """
        loss = float(self._world.sum(self._loss)) / (self._loss_steps * self._world.size)
        passed = time.perf_counter() - self._since
        values = {
            "train/loss": loss,
            **self._mean_plain_loss(),
            "train/lr": learning_rate,
            "train/grad_norm": float(grad_norm),
            "train/images_per_s": self._images / passed,
            "train/data_wait": self._waited / passed,
            "train/memory_mib": memory_mib(self._world.device),
        }
        self._reset()
        return values

    def _mean_plain_loss(self) -> dict[str, float]:
        if not self._plain_steps:
            return {}
        total = float(self._world.sum(self._plain))
        return {"train/cross_entropy": total / (self._plain_steps * self._world.size)}


def memory_mib(device: torch.device) -> float:
    """Return the most memory used so far, in MiB: of the GPU, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
