"""Run `deepvit-train` from Python: in a script, or in a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepvit_train.commands.train import run
from deepvit_train.config.compose import compose_command
from deepvit_train.data.loader import loaders_closed
from deepvit_train.determinism import generators_kept
from deepvit_train.error import UserError, explained


def train(*overrides: str) -> dict[str, Any]:
    """Train as `deepvit-train KEY=VALUE ...` does: train("model.depth=2", "data=digits").

    What a run changes in this process is put back afterwards: signal handlers, random generators, the number
    of threads; loader processes are ended. On a GPU torch's generator keeps the run's seed.

    Args:
        overrides: KEY=VALUE, as on the command line.

    Returns:
        What the run's result.json holds: `run_dir`, and the metrics of the last evaluation.

    Raises:
        UserError: one of its subclasses, as the exit codes of the command tell them apart. `Interrupted`
            comes after a stop signal, which Ctrl-C and a notebook's stop button send; the run is saved first.
    """
    try:
        with explained("train"), generators_kept(), _threads_kept(), loaders_closed():
            return run(compose_command("train", overrides))
    except UserError as error:
        # Without the frames that it came through: its message says enough.
        raise error.with_traceback(None) from None


@contextmanager
def _threads_kept() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
