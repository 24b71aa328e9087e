"""A run's folder. One process locks it, and only the same configuration may go on with it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from deepvit_train.atomic import inside, make_folder, open_lock, remove, write_text
from deepvit_train.config.alias import current_config, former_names
from deepvit_train.config.data import DataConfig
from deepvit_train.error import CheckpointError, ConfigError, OutputError
from deepvit_train.reading import read_json, read_yaml
from deepvit_train.run import schema
from deepvit_train.run.change import EFFECTS, differences, may_change
from deepvit_train.run.checkpoint import checkpoints_in, identities_in, newest_valid
from deepvit_train.run.copied import copies_in, settle_copies
from deepvit_train.run.identity import check_config, check_runs, new_run, read_run, write_run

LOCK = ".lock"


class RunFolder:
    """The folder runs/NAME: config.yaml, environment.json, metrics.jsonl, tb/, checkpoints/.

    It is a context manager: inside, the folder is locked.

    Args:
        data: what the run reads, by which a run is found under the name that an earlier version gave it.
        writes: whether this process makes, locks and writes the folder. Only one does.
    """

    def __init__(self, path: str, data: DataConfig | None = None, writes: bool = True) -> None:
        self.writes = writes
        self.run = ""  # the run's number, once `adopt` knows it
        try:
            self.path = _existing(Path(path).expanduser(), data)
        except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
            raise OutputError(
                f"run_dir={path}: can't be used ({getattr(error, 'strerror', None) or error})"
            ) from None
        self.checkpoints = self.path / "checkpoints"
        self._lock: int | None = None
        self._opened: int | None = None  # the folder itself
        self._config: dict[str, Any] | None = None  # to be stored

    def __enter__(self) -> RunFolder:
        if not self.writes:
            return self
        try:
            make_folder(self.path)
            inside(self.path, "result.json")  # else the end of the training would find out
            strangers = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
            if strangers and "config.yaml" not in strangers:
                raise OutputError(
                    f"run_dir={self.path}: holds {strangers[0]} but no run; give an empty or new folder"
                )
            self._opened = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            self._lock = open_lock(self.path / LOCK)
            self._take_lock(self._lock)
            self.check_held()
            for left in self.path.glob(f".{'?' * 16}.partial"):  # by a kill while a file was written
                remove(left)
        except OSError as error:
            raise OutputError(f"run_dir={self.path}: can't be written ({error.strerror})") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in (self._lock, self._opened):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._opened = None

    def check_held(self) -> None:
        """Raise OutputError if the folder is no longer the one that this process locked.

        It may have been removed or moved, and another run may have begun under its name. To be called before
        anything is written. Both are kept open, so that the system gives their numbers to no other file.
        """
        for descriptor, path in ((self._opened, self.path), (self._lock, self.path / LOCK)):
            if descriptor is None:
                continue
            try:
                there = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                there = None
            except OSError:
                continue  # a share that does not answer for a moment: the write itself will tell
            if there is None or not os.path.samestat(there, os.fstat(descriptor)):
                raise OutputError(
                    f"{path}: was removed, moved or replaced since this process locked it; nothing more is "
                    "written there"
                )

    def _take_lock(self, descriptor: int) -> None:
        # A POSIX lock belongs to this process alone: loader processes that outlive it do not hold it.
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise OutputError(
                    f"run_dir={self.path}: this file system gives no POSIX locks ({error.strerror}); "
                    "docs/cluster.md says what does"
                ) from None
            holder = os.read(descriptor, 64).decode("ascii", errors="replace").strip()
            holder = holder if holder.isdigit() else ""
            raise OutputError(
                f"run_dir={self.path}: process {holder or '(unknown)'} is writing there"
            ) from None
        if os.fstat(descriptor).st_nlink > 1:
            return  # the same file has another name elsewhere, so nothing is written to it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run to go on with, which has saved something."""
        return bool(checkpoints_in(inside(self.path, "checkpoints")) or copies_in(self.checkpoints))

    def newest(self, note: Callable[[str], None]) -> Path | None:
        """Return the newest whole checkpoint, or None if there is none or this process does not write.

        Raises CheckpointError if there are checkpoints and none is whole: a run must not silently begin anew.
        """
        if not self.writes:
            return None
        try:
            settle_copies(self.checkpoints)
        except OSError as error:
            raise OutputError(f"{self.checkpoints}: can't be written ({error.strerror})") from None
        newest = newest_valid(self.checkpoints, note)
        if self.begun and newest is None:
            raise CheckpointError(
                f"{self.checkpoints}: no checkpoint is whole; to begin anew, move that folder away"
            )
        return newest

    def check_identity(self) -> None:
        """Raise ForeignError for a checkpoint here that is of another run or step than its place says.

        Damaged checkpoints are passed over: `newest` tells of them.
        """
        found = identities_in(self.checkpoints)
        check_runs(found)
        if found and (self.path / "config.yaml").is_file():
            config = self.stored_config()
            for checkpoint, said in found.items():
                check_config(checkpoint, said, config)

    def _own_run(self) -> str:
        """Return the number of the run that has begun here. One of version 0.1.0 gets its number now."""
        own = read_run(self.path)
        found = identities_in(self.checkpoints)
        return own or (list(found.values())[-1].run if found else new_run())

    def adopt(self, config: dict[str, Any], resume: str, note: Callable[[str], None]) -> None:
        """Take the configuration of a run that begins or goes on here.

        It is stored at once for a run that begins: config.yaml is the first file of a run, and after a kill
        a folder without it holds no run. For a run that goes on, `keep_config` stores it.

        Raises ConfigError if the run here has another one, naming the keys in which they differ.
        """
        if not self.writes:
            return
        self._config = config
        self.run = self._own_run() if self.begun else new_run()
        if self.begun:
            if resume == "never":
                raise ConfigError(
                    f"resume=never: {self.path} holds a run already; choose another name= or run_dir="
                )
            changes = differences(self.stored_config(), config)
            if refused := [
                line for key, line in changes.items() if not may_change(key, self.stored_config(), config)
            ]:
                raise ConfigError(
                    f"{self.path} holds a run with {'; '.join(refused)}; choose another name= or run_dir="
                )
            for key, line in changes.items():
                if key not in ("name", "run_dir", "resume"):
                    effect = f": {EFFECTS[key]}" if key in EFFECTS else ""
                    note(f"changed since the run began: {line}{effect}")
        else:
            self.keep_config()
        if read_run(self.path) != self.run:
            write_run(self.path, self.run)
        make_folder(self.path, "checkpoints")

    def keep_config(self) -> None:
        """Store the configuration, once. To be called when the run is about to save something with it.

        A start that fails before leaves config.yaml as it was, so that the former command still goes on. From
        now on result.json and report.html would be about an older checkpoint, so they are removed.
        """
        self.check_held()
        if self._config is not None:
            for outdated in ("result.json", "report.html"):
                remove(self.path / outdated)
            write_text(self.path / "config.yaml", yaml.safe_dump(self._config, sort_keys=False))
            self._config = None

    def stored_config(self) -> dict[str, Any]:
        """Read the configuration that the run began or last went on with.

        Raises OutputError where it can't be read, CheckpointError where it is damaged.
        """
        file = self.path / "config.yaml"
        try:
            return current_config(schema.fitting(read_yaml(file), schema.CONFIG, file))
        except OSError as error:
            raise OutputError(f"{file}: can't be read ({error.strerror})") from None

    def note_environment(self, environment: dict[str, Any]) -> None:
        """Append what this start runs on to environment.json, a list with one entry for each start."""
        if not self.writes:
            return
        self.check_held()
        file = self.path / "environment.json"
        try:
            starts = schema.fitting(read_json(file), schema.ENVIRONMENT, file)
        except (OSError, CheckpointError):
            starts = []
        write_text(file, json.dumps([*starts, environment], indent=1) + "\n")

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the outcome of a finished run to result.json."""
        if self.writes:
            self.check_held()
            write_text(self.path / "result.json", json.dumps(result, indent=1) + "\n")


def _existing(path: Path, data: DataConfig | None) -> Path:
    """Return the folder to use: this one, or the one that an earlier version made for a run of this name."""
    if path.exists():
        return path
    names = former_names(path.name, data)
    former = [path.with_name(name) for name in names if (path.with_name(name) / "config.yaml").is_file()]
    return next((folder for folder in former if data is None or _reads(folder, data)), path)


def _reads(folder: Path, data: DataConfig) -> bool:
    """Return whether the run in a folder read the data set in the same place."""
    try:
        root = read_yaml(folder / "config.yaml")["data"]["root"]
        roots = [each and str(Path(each).expanduser().resolve()) for each in (root, data.root)]
    except (OSError, RuntimeError, CheckpointError, KeyError, TypeError):
        return False
    return roots[0] == roots[1]
