"""Checkpoints: a folder each, of safetensors and JSON, with a SHA-256 manifest that is written last.

    RUN/checkpoints/step_0000100/   model, ema, optimizer, calibrated .safetensors; state.json; manifest.json
    RUN/checkpoints/last, best      links to two of them

This module finds, verifies and reads checkpoints; saving.py writes them. Nothing is pickled, and nothing that
is read back is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deepvit_train.error import CheckpointError, nearest
from deepvit_train.run.identity import ForeignError, Identity, check_place, read_identity

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SET_ASIDE = "-before"  # ends the name of a checkpoint while another of its step takes its place
WEIGHT_FILES = {"live": "model", "ema": "ema"}  # stems of the files of a checkpoint that hold a whole model


class UnreadableError(CheckpointError):
    """A checkpoint that this user may not read. It may be whole, so no older one takes its place."""


@dataclass(frozen=True)
class Found:
    """What a path that the user gave leads to: a weights file, and the checkpoint and run it belongs to.

    Args:
        file: the weights file.
        folder: the folder of its checkpoint, or None for a weights file on its own.
        run: the folder of its run, or None if the checkpoint lies outside of one.
        kind: 'live' or 'ema', by the file's name. A file of torch.save may hold both; its reader chooses.
    """

    file: Path
    folder: Path | None
    run: Path | None
    kind: str

    def calibrated(self) -> dict[str, Tensor] | None:
        """Return the calibrated statistics of these weights, or None if there are none."""
        return None if self.folder is None else read_calibrated(self.folder).get(self.kind)

    def data_path(self, key: str) -> str | None:
        """Return the path that the run's data had for a key, or None if that is not known.

        Args:
            key: 'data_root' for the folder of its images, 'class_map' for the file of their classes.
        """
        path = None if self.folder is None else read_state(self.folder).get(key)
        return None if path is None else str(path)

    def beside(self, ending: str) -> Path:
        """Return the path for a result: beside the checkpoint's folder, or beside a weights file."""
        subject = self.file if self.folder is None else self.folder.resolve()
        return subject.with_name(f"{subject.name}.{ending}")


def find(path: str, weights: str = "auto", prefer: str = "best", key: str = "checkpoint") -> Found:
    """Find the weights file that a path means. The checkpoint that was chosen for it is verified.

    Args:
        path: a weights file; a folder of deepvit-convert; a checkpoint; or a run, which stands for its best
            checkpoint, or for its newest whole one if it has no best one.
        weights: 'live', 'ema', or 'auto' for the averaged weights where a checkpoint has both.
        prefer: 'best', or 'last' if a run is to stand for its newest whole checkpoint.
        key: the key that the path was given by, for messages.

    Raises CheckpointError.
    """
    try:
        given = _followed(Path(path).expanduser())
        return _found_at(given, weights, prefer, key)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"{key}={path}: can't be read ({reason})") from None


def _found_at(given: Path, weights: str, prefer: str, key: str) -> Found:
    if given.is_file():
        return _found(given)
    if not given.is_dir():
        siblings = [entry.name for entry in given.parent.iterdir()] if given.parent.is_dir() else []
        raise CheckpointError(f"{key}={given}: no such file or folder{nearest(given.name, siblings)}")
    if (given / MANIFEST).exists() or (given / STATE).exists():
        verify(given)
        return _found(_weights_in(given, weights))
    if (converted := given / f"{WEIGHT_FILES['live']}.safetensors").is_file():
        return _found(converted)
    return _found(_weights_in(_chosen_of_run(given, prefer, key), weights))


def _followed(path: Path) -> Path:
    """Follow a link that a kill left dangling, to the checkpoint that was set aside."""
    aside = Path(f"{path.resolve()}{SET_ASIDE}") if path.is_symlink() else path
    return aside if not path.exists() and aside.exists() else path


def _chosen_of_run(given: Path, prefer: str, key: str) -> Path:
    """Choose a checkpoint of a run, verified. The run's folder or its folder of checkpoints was given."""
    folder = given if given.name == "checkpoints" else given / "checkpoints"
    if prefer == "best" and (best := _followed(folder / "best")).exists():
        verify(best)
        return best.resolve()
    problems: list[str] = []
    newest = newest_valid(folder, problems.append)
    if newest is None:
        raise CheckpointError(
            problems[0] if problems else f"{key}={given}: holds no checkpoint (looked in {folder})"
        )
    return newest


def _weights_in(folder: Path, weights: str) -> Path:
    """Return the file of a checkpoint that holds the weights asked for."""
    present = {
        kind: file for kind, stem in WEIGHT_FILES.items() if (file := folder / f"{stem}.safetensors").exists()
    }
    kind = ("ema" if "ema" in present else "live") if weights == "auto" else weights
    if kind not in present:
        raise CheckpointError(f"{folder}: holds no {kind} weights; nearest: weights=auto")
    return present[kind]


def _found(file: Path) -> Found:
    folder = file.parent if (file.parent / MANIFEST).exists() else None
    run = None
    if folder is not None and (parent := folder.resolve().parent).name == "checkpoints":
        run = parent.parent
    return Found(file, folder, run, "ema" if file.stem == WEIGHT_FILES["ema"] else "live")


def checkpoints_in(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first, by the step in their names and not by the clock.

    Raises UnreadableError for a folder that may not be listed: it does not count as empty.
    """
    try:
        entries = list(folder.iterdir()) if folder.is_dir() else []
        found = {
            path: int(step)
            for path in entries
            if path.name.startswith("step_")
            and (step := path.name[5:].removesuffix(SET_ASIDE)).isdigit()
            and path.is_dir()
        }
    except PermissionError as error:
        raise _unread(folder, error) from None
    return sorted(found, key=lambda path: (found[path], not path.name.endswith(SET_ASIDE)))


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole. `warn` is told of each damaged one that is newer.

    Raises UnreadableError for a newer one that may not be read, ForeignError for one of another run.
    """
    for path in reversed(checkpoints_in(folder)):
        try:
            verify(path)
        except (UnreadableError, ForeignError):
            raise
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
        else:
            return path
    return None


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its digest, and what it says with its place inside a run.

    Raises CheckpointError that names the file; UnreadableError where it is not damaged, but may not be read;
    ForeignError where it is whole, but of another step or run than its place says.
    """
    manifest = _read_json(path / MANIFEST)
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or STATE not in digests or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: not a manifest of format {FORMAT}")
    # No digest covers the manifest itself, but there is only one way to write its content.
    if (path / MANIFEST).read_text() != as_json(manifest):
        raise CheckpointError(f"{path / MANIFEST}: damaged checkpoint (not as it was written)")
    for name, digest in digests.items():
        file = path / name
        if Path(name).name != name or file.is_symlink():
            raise CheckpointError(f"{path / MANIFEST}: names {name!r}, which is not a file of the checkpoint")
        try:
            found = digest_of(file)
        except OSError as error:
            raise _unread(file, error) from None
        if found != digest:
            raise CheckpointError(f"{file}: damaged checkpoint (its SHA-256 is not the manifest's)")
    check_place(path, read_state(path))


def identities_in(folder: Path) -> dict[Path, Identity]:
    """Return what the checkpoints in a folder say of their runs, oldest first.

    Left out are those of version 0.1.0, which say nothing, and damaged ones, which are not believed. Raises
    ForeignError for one that is not what its place says.
    """
    found: dict[Path, Identity] = {}
    for path in checkpoints_in(folder):
        try:
            if _read_json(path / MANIFEST)["sha256"][STATE] != digest_of(path / STATE):
                continue
            state = read_state(path)
        except (CheckpointError, KeyError, TypeError, OSError):
            continue
        check_place(path, state)
        if (said := read_identity(state)) is not None:
            found[path] = said
    return found


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json. Raises CheckpointError where a newer format wrote it."""
    state = _read_json(path / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {state.get('format')!r}; this version reads {FORMAT}")
    return state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, onto the CPU. Raises CheckpointError."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read ({error})") from None


def read_calibrated(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the calibrated statistics of a checkpoint, for 'live' and 'ema'; empty if it has none."""
    file = folder / "calibrated.safetensors"
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in (read_tensors(file) if file.exists() else {}).items():
        name, _, buffer = key.partition(".")
        found.setdefault(name, {})[buffer] = value
    return found


def digest_of(path: Path, flush: bool = False) -> str:
    """Return the SHA-256 of a file. With `flush` the file is on the disk before it is read."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def as_json(content: dict[str, Any]) -> str:
    """Return the text of a JSON file of a checkpoint: the same content always gives the same text."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise _unread(path, error) from None
    except ValueError:
        raise CheckpointError(f"{path}: damaged checkpoint (not JSON)") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged checkpoint (not a JSON object)")
    return content


def _unread(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that could not be read: what may not be read is not damaged."""
    if isinstance(error, PermissionError):
        return UnreadableError(f"{path}: can't be read ({error.strerror}); its owner can allow it")
    return CheckpointError(f"{path}: damaged checkpoint ({error.strerror})")
