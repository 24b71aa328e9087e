"""Checkpoints written beside training: an exact snapshot is taken at once, the disk is waited for later."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deepvit_train import checkpoint
from deepvit_train.checkpoint import TensorFile


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread, moves `last` and `best` to it, and prunes older ones.

    A kill at any moment leaves what it would leave without the thread: whole checkpoints, perhaps one fewer.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, files: dict[str, TensorFile], state: dict[str, Any], best: bool) -> None:
        """Begin to write a checkpoint of the tensors and the state as they are now.

        Waits for the one before. Raises OutputError where that could not be written.
        """
        self.wait()
        snapshot = {
            name: TensorFile(
                {key: value.detach().to("cpu", copy=True) for key, value in file.tensors.items()},
                file.description,
            )
            for name, file in files.items()
        }
        self._pending = self._thread.submit(self._write, step, snapshot, json.loads(json.dumps(state)), best)

    def wait(self) -> None:
        """Return once everything is on the disk. Raises OutputError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the write under way end. What went wrong with it, `wait` tells."""
        self._thread.shutdown(wait=True)

    def newest(self) -> Path | str:
        """The newest checkpoint on the disk, to be named in a message."""
        self.wait()
        return (checkpoint.checkpoints_in(self.folder) or ["none"])[-1]

    def _write(self, step: int, files: dict[str, TensorFile], state: dict[str, Any], best: bool) -> None:
        written = checkpoint.write_checkpoint(self.folder, step, files, state)
        checkpoint.point(self.folder, "last", written)
        if best:
            checkpoint.point(self.folder, "best", written)
        checkpoint.prune(self.folder, self.keep_last, keep={(self.folder / "best").resolve().name})
