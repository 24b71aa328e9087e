"""Saves the state of a run before it is evaluated, and adds the outcome afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit_train.config.data import DataConfig, absolute
from deepvit_train.distributed.parallel import whole
from deepvit_train.run.saving import CheckpointWriter
from deepvit_train.training.state import TrainState


@dataclass(kw_only=True)
class Saver:
    """Saves a state as a checkpoint. All ranks must call the same methods, and the first one writes.

    Args:
        header: what the files of weights say about the model.
        data: where the images are read from.
        about: what else a checkpoint says: of its run, its images, and what its numbers were rounded by.
        writer: only the first rank has one.
        keep_config: stores the configuration that the state was trained with; called before each save.
        saved_step: the step of the newest checkpoint in the run's folder, or -1.
    """

    state: TrainState
    header: dict[str, str]
    data: DataConfig
    about: dict[str, Any]
    writer: CheckpointWriter | None
    keep_config: Callable[[], None]
    saved_step: int = -1

    def save(self) -> None:
        """Begin to write a checkpoint."""
        files = self.state.files(self.header)
        self.saved_step = self.state.step
        if self.writer is None:
            for file in files.values():
                for tensor in file.tensors.values():
                    whole(tensor)  # the first rank needs this rank's part of it
            return
        self.keep_config()
        self.writer.save(self.state.step, files, self._plain(), best=False)

    def complete(self, best: bool) -> None:
        """Begin to add the outcome of the state's evaluation to its checkpoint."""
        if self.writer is not None:
            self.keep_config()
            self.writer.complete(self.state.step, self.state.evaluation_files(), self._plain(), best)

    def wait(self) -> None:
        """Wait until everything is on the disk. Raises OutputError if it could not be written."""
        if self.writer is not None:
            self.writer.wait()

    def newest(self) -> Path | str:
        """Name the newest checkpoint in a message, once it is on the disk."""
        return "the checkpoint of the first rank" if self.writer is None else self.writer.newest()

    def _plain(self) -> dict[str, Any]:
        return self.state.plain() | {
            "data_root": absolute(self.data.root),
            "class_map": absolute(self.data.class_map),
            "data_keys": self.data.of_data_set(),
            **self.about,
        }
