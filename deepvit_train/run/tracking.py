"""What a run tells while it trains: TensorBoard, metrics.jsonl with the same scalars, and the terminal."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from deepvit_train.distributed.world import World
from deepvit_train.error import OutputError

# Paths and figures are printed as they are: no markup, no colouring, no wrapping inside a word to be copied.
console = Console(markup=False, highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 200  # a file or a pipe has no width: no table is squeezed into 80 columns


class Tracker:
    """Writes scalars by step. On a resume, everything after the step it goes on from is taken back first.

    Without a folder (ranks other than the first) it writes nothing.
    """

    def __init__(self, folder: Path | None, resumed_step: int) -> None:
        self._writer = None
        self._folder = folder
        if folder is not None:
            kept = resumed_step or -1  # a run that begins anew logs step 0 anew
            with _writing(folder):
                _drop_later(folder / "metrics.jsonl", kept)
                self._file = (folder / "metrics.jsonl").open("a", buffering=1)
                self._writer = SummaryWriter(str(folder / "tb"), purge_step=kept + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log scalars by their TensorBoard names: {'train/loss': 1.2}."""
        if self._writer:
            with _writing(self._folder):
                self._file.write(json.dumps({"step": step, **values}) + "\n")
                for name, value in values.items():
                    self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Log preformatted text."""
        if self._writer:
            with _writing(self._folder):
                self._writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def images(self, name: str, images: Tensor, step: int) -> None:
        """Log images (B, 3, height, width) with values in 0..1 as a grid."""
        if self._writer:
            with _writing(self._folder):
                self._writer.add_image(name, make_grid(images, nrow=math.ceil(len(images) ** 0.5)), step)

    def outcome(self, config: dict[str, Any], metrics: dict[str, float], step: int) -> None:
        """Log hyperparameters with the final metrics, for TensorBoard's table of runs."""
        if self._writer:
            flat = {
                key: value if isinstance(value, (bool, int, float)) else str(value)
                for key, value in config.items()
            }
            final = {f"final/{name}": value for name, value in metrics.items()}
            with _writing(self._folder):
                self._writer.add_hparams(flat, final, run_name=".", global_step=step)

    def close(self) -> None:
        """Write what is held back."""
        if self._writer:
            with _writing(self._folder):
                self._file.close()
                self._writer.close()


@contextmanager
def _writing(folder: Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: curves and metrics can't be written ({error.strerror})") from None


class Meter:
    """Averages over the steps since the last log line. Losses stay on the device until then.

    A run that goes on between two lines brings the sum of each rank's losses since, and the number of steps.
    """

    def __init__(self, world: World, losses: Sequence[float] = (), steps: int = 0) -> None:
        self._world = world
        self._reset()
        self._loss_steps = steps
        if len(losses) == world.size:
            self._loss += losses[world.rank]
        elif losses:
            self._loss += sum(losses) / len(losses)  # of another number of ranks

    def _reset(self) -> None:
        self._loss = torch.zeros((), device=self._world.device)
        self._loss_steps = self._images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, loss: Tensor, images: int, waited_s: float) -> None:
        """Count a step: its loss, its images over all ranks, and how long it waited for them."""
        self._loss += loss
        self._loss_steps += 1
        self._images += images
        self._waited += waited_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside: it is not training."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def losses(self) -> tuple[list[float], int]:
        """The sum of each rank's losses since the last line, and how many steps. Waits for the device."""
        return self._world.each(float(self._loss)), self._loss_steps

    def take(self, learning_rate: float, grad_norm: Tensor) -> dict[str, float]:
        """The scalars of a log line, the loss averaged over ranks; starts over. Waits for the device."""
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
    """The most memory used so far, MiB: the device's, or this process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def progress_bar() -> Progress:
    """Steps done, time taken and time left; shown on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _drop_later(file: Path, step: int) -> None:
    """Drop the lines after a step, and one that a kill cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    partial.replace(file)
