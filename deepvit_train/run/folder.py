"""A run's folder. One process locks it, and only the same configuration may go on with it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from deepvit_train.atomic import write_text
from deepvit_train.config.alias import BEFORE, current_config, former_name
from deepvit_train.error import CheckpointError, ConfigError, OutputError
from deepvit_train.run.checkpoint import checkpoints_in, newest_valid

# These may change when a run goes on. They say where it runs and what it tells, not what it computes.
FREE_KEYS = {
    "data.root",
    "data.class_map",
    "data.allow_subset",
    "data.workers",
    "data.max_bad",
    "data.max_bytes",
    "data.max_pixels",
    "data.follow_links",
    "trainer.eval_batch_size",
    "trainer.eval_every_epochs",
    "trainer.calibrate_images",
    "trainer.accumulate",
    "trainer.compile",
    "trainer.device",
    "trainer.threads",
    "trainer.shard",
    "trainer.grad_checkpointing",
    "trainer.log_every_steps",
    "trainer.save_every_steps",
    "trainer.probe_every_steps",
    "collapse.maps",
    "collapse.metric",
    "collapse.axis",
    "collapse.threshold",
    "collapse.k",
    "collapse.images",
    "collapse.warn_above",
    "collapse.stop_above",
    "collapse.swap_rise",
    "collapse.alarm_from",
    "trainer.keep_last",
    "trainer.max_scaler_skips",
    "trainer.timeout_s",
    "trainer.requeue",
    "name",
    "run_dir",
    "resume",
}
# What some of them do change. It is said when a run goes on with another value.
EFFECTS = {
    "trainer.accumulate": "sums round differently; BatchNorm and dropout see other parts of a batch",
    "trainer.compile": "results round differently",
    "trainer.threads": "results round differently",
    "trainer.eval_batch_size": "training does not change; statistics are calibrated on batches of this size",
    "trainer.calibrate_images": "training does not change; evaluations do",
    "data.max_bytes": "training changes only if images become readable or unreadable",
    "data.max_pixels": "training changes only if images become readable or unreadable",
}
# These may grow, to train the same run for longer.
GROWING_KEYS = {"trainer.epochs", "trainer.max_steps"}


class RunFolder:
    """The folder runs/NAME: config.yaml, environment.json, metrics.jsonl, tb/, checkpoints/.

    It is a context manager: inside, the folder is locked.
    """

    def __init__(self, path: str, writes: bool = True) -> None:
        self.writes = writes  # one process alone makes, locks and writes the folder
        try:
            self.path = _existing(Path(path).expanduser())
        except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
            raise OutputError(
                f"run_dir={path}: can't be used ({getattr(error, 'strerror', None) or error})"
            ) from None
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None
        self._config: dict[str, Any] | None = None  # to be stored

    def __enter__(self) -> RunFolder:
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            if strangers and "config.yaml" not in strangers:
                raise OutputError(
                    f"run_dir={self.path}: holds {strangers[0]} but no run; give an empty or new folder"
                )
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
            self._take_lock(self._lock)
        except OSError as error:
            raise OutputError(f"run_dir={self.path}: can't be written ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _take_lock(self, descriptor: int) -> None:
        # A POSIX lock belongs to this process alone: loader processes that outlive it do not hold it.
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip()
            raise OutputError(
                f"run_dir={self.path}: process {holder or '(unknown)'} is writing there"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run to go on with, which has saved something."""
        return bool(checkpoints_in(self.checkpoints))

    def newest(self, note: Callable[[str], None]) -> Path | None:
        """Return the newest whole checkpoint, or None if there is none or this process does not write.

        Raises CheckpointError if there are checkpoints and none is whole: a run must not silently begin anew.
        """
        newest = newest_valid(self.checkpoints, note) if self.writes else None
        if self.writes and self.begun and newest is None:
            raise CheckpointError(
                f"{self.checkpoints}: no checkpoint is whole; to begin anew, move that folder away"
            )
        return newest

    def adopt(self, config: dict[str, Any], resume: str, note: Callable[[str], None]) -> None:
        """Take the configuration of a run that begins or goes on here.

        It is stored at once for a run that begins: config.yaml is the first file of a run, and after a kill
        a folder without it holds no run. For a run that goes on, `keep_config` stores it.

        Raises ConfigError if the run here has another one, naming the keys in which they differ.
        """
        if not self.writes:
            return
        self._config = config
        if self.begun:
            if resume == "never":
                raise ConfigError(
                    f"resume=never: {self.path} holds a run already; choose another name= or run_dir="
                )
            changes = differences(self.stored_config(), config)
            if refused := [
                line for key, line in changes.items() if not _may_change(key, self.stored_config(), config)
            ]:
                raise ConfigError(
                    f"{self.path} holds a run with {'; '.join(refused)}; choose another name= or run_dir="
                )
            for key, line in changes.items():
                if key not in ("name", "run_dir", "resume"):
                    effect = f": {EFFECTS[key]}" if key in EFFECTS else ""
                    note(f"changed since the run began: {line}{effect}")
        else:
            (self.path / "result.json").unlink(missing_ok=True)  # left by a run without checkpoints
            self.keep_config()
        self.checkpoints.mkdir(exist_ok=True)

    def keep_config(self) -> None:
        """Store the configuration, once. To be called when the run is about to save something with it.

        A start that fails before leaves config.yaml as it was, so that the former command still goes on.
        """
        if self._config is not None:
            write_text(self.path / "config.yaml", yaml.safe_dump(self._config, sort_keys=False))
            self._config = None

    def stored_config(self) -> dict[str, Any]:
        """Read the configuration that the run began or last went on with. Raises OutputError."""
        try:
            content = yaml.safe_load((self.path / "config.yaml").read_text())
        except (OSError, yaml.YAMLError) as error:
            raise OutputError(
                f"{self.path / 'config.yaml'}: can't be read ({str(error).splitlines()[0]})"
            ) from None
        if not isinstance(content, dict):
            raise OutputError(f"{self.path / 'config.yaml'}: not a configuration")
        return current_config(content)

    def note_environment(self, environment: dict[str, Any]) -> None:
        """Append what this start runs on to environment.json, a list with one entry for each start."""
        if not self.writes:
            return
        file = self.path / "environment.json"
        try:
            starts = json.loads(file.read_text())
        except (OSError, ValueError):
            starts = []
        write_text(file, json.dumps([*starts, environment], indent=1) + "\n")

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the outcome of a finished run to result.json."""
        if self.writes:
            write_text(self.path / "result.json", json.dumps(result, indent=1) + "\n")


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """Return the keys in which two configurations differ, with a line for each: `model.depth=6 (now 8)`.

    A key that only `before` has is left out: this version does not know it any more. So is a key that only
    `after` has and that asks for what a version without it did: nothing, or what `BEFORE` says.
    """
    old, new = BEFORE | flatten(before), flatten(after)
    return {
        key: f"{key}={old.get(key, 'not set')} (now {value})"
        for key, value in sorted(new.items())
        if old.get(key) != value and (key in old or value not in (None, False))
    }


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration as a flat one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _existing(path: Path) -> Path:
    """The folder to use: this one, or the one that version 0.1 made for a run of the same name."""
    former = path.parent / former_name(path.name)
    return former if former.exists() and not path.exists() else path


def _may_change(key: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    if key in GROWING_KEYS:
        old, new = flatten(before).get(key), flatten(after).get(key)
        return new is None or (old is not None and new >= old)
    return key in FREE_KEYS
