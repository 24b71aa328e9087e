"""Checkpoints: a folder each, of safetensors and JSON, with a SHA-256 manifest that is written last.

    RUN/checkpoints/step_0000100/   model, ema, optimizer, calibrated .safetensors; state.json; manifest.json
    RUN/checkpoints/last, best      links to two of them

This module verifies and reads checkpoints, found.py finds those that a path leads to, and saving.py writes
them. Nothing is pickled, and nothing that is read back is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deepvit_train.error import CheckpointError
from deepvit_train.reading import ContentError, open_file, parse_json, read_bytes, what_lies_at
from deepvit_train.run import schema
from deepvit_train.run.identity import ForeignError, Identity, check_place, read_identity
from deepvit_train.run.link import NAME, SET_ASIDE, check_links
from deepvit_train.run.tensor import check_fit, read_tensors

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
CALIBRATED = "calibrated.safetensors"
STATISTIC = re.compile(r"blocks\.\d+\.attn\.norm\.running_(?:mean|var)", re.ASCII)
WEIGHT_FILES = {"live": "model", "ema": "ema"}  # stems of the files of a checkpoint that hold a whole model


class UnreadableError(CheckpointError):
    """A checkpoint that this user may not read. It may be whole, so no older one takes its place."""


def checkpoints_in(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first, by the step in their names and not by the clock.

    Raises UnreadableError for a folder that may not be listed: it does not count as empty.
    """
    try:
        entries = list(folder.iterdir()) if folder.is_dir() else []
        found = {
            path: int(name[1])
            for path in entries
            if (name := NAME.fullmatch(path.name)) and (path.is_dir() or path.is_symlink())
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
    """Compare every file that a checkpoint's manifest lists with its digest. No other file is ever read.

    What the checkpoint says of itself is compared with its place inside a run.

    Raises CheckpointError that names the file; UnreadableError where it is not damaged, but may not be read;
    ForeignError where it is whole, but holds what no run writes, or is of another step or run than its place
    says.
    """
    check_links(path)
    for name, digest in signed(path).items():
        file = path / name
        if file.is_symlink():
            raise CheckpointError(f"{file}: damaged checkpoint (it is {what_lies_at(file)})")
        try:
            found = digest_of(file)
        except OSError as error:
            raise _unread(file, error) from None
        if found != digest:
            raise CheckpointError(f"{file}: damaged checkpoint (its SHA-256 is not the manifest's)")
    try:
        state = read_state(path)
    except CheckpointError as error:
        raise ForeignError(str(error)) from None
    check_place(path, state)


def identities_in(folder: Path) -> dict[Path, Identity]:
    """Return what the checkpoints in a folder say of their runs, oldest first.

    Left out are those of version 0.1.0, which say nothing, and damaged ones, which are not believed. Raises
    ForeignError for one that is not what its place says.
    """
    found: dict[Path, Identity] = {}
    for path in checkpoints_in(folder):
        try:
            if signed(path)[STATE] != digest_of(path / STATE):
                continue
            state = read_state(path)
        except (CheckpointError, OSError):
            continue
        check_place(path, state)
        if (said := read_identity(state)) is not None:
            found[path] = said
    return found


def signed(path: Path) -> dict[str, str]:
    """Return the names of a checkpoint's files with their digests, as its manifest lists them.

    Raises as `verify` does. The files themselves are not looked at.
    """
    file = path / MANIFEST
    text = _read(file)
    manifest = _parsed(file, text)
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or STATE not in digests or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: not a manifest of format {FORMAT}")
    # No digest covers the manifest itself, but there is only one way to write its content.
    if text != as_json(manifest).encode():
        raise CheckpointError(f"{file}: damaged checkpoint (not as it was written)")
    for name in digests:
        if Path(name).name != name:
            raise CheckpointError(f"{file}: names {name!a}, which is not a file of the checkpoint")
    return schema.fitting(manifest, schema.MANIFEST, file)["sha256"]


def signed_file(folder: Path, stem: str) -> Path:
    """Return a file of tensors of a checkpoint. Raises CheckpointError if its manifest lists none."""
    file = folder / f"{stem}.safetensors"
    if file.name not in signed(folder):
        raise CheckpointError(f"{file}: the checkpoint's manifest does not list it, so it is not read")
    return file


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json. Raises CheckpointError where it is damaged or of a newer format."""
    state = _read_json(path / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {state.get('format')!r}; this version reads {FORMAT}")
    return schema.fitting(state, schema.STATE, path / STATE)


def read_calibrated(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Read the calibrated statistics of a checkpoint, for 'live' and 'ema'; empty if it has none.

    Raises CheckpointError if the file holds anything else.
    """
    file = folder / CALIBRATED
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in (read_tensors(file) if file.name in signed(folder) else {}).items():
        name, _, buffer = key.partition(".")
        if name not in WEIGHT_FILES or not STATISTIC.fullmatch(buffer):
            raise CheckpointError(f"{file}: holds {key!a}, which is not a statistic of a mixing block")
        found.setdefault(name, {})[buffer] = value
    return found


def check_statistics(model: nn.Module, statistics: dict[str, Tensor], file: Path) -> None:
    """Raise CheckpointError if a model has not the BatchNorms that the statistics of a file are of."""
    own = dict(model.named_buffers())
    try:
        check_fit({name: own[name] for name in statistics if name in own}, statistics, exact=True)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None


def digest_of(path: Path, flush: bool = False) -> str:
    """Return the SHA-256 of a file. With `flush` the file is on the disk before it is read."""
    with open_file(path) as file:
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
    return _parsed(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise _unread(path, error) from None


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        content = parse_json(text)
    except ContentError as error:
        raise CheckpointError(f"{path}: damaged checkpoint ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged checkpoint (not a JSON object)")
    return content


def _unread(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that could not be read: what may not be read is not damaged."""
    if isinstance(error, PermissionError):
        return UnreadableError(f"{path}: can't be read ({error.strerror}); its owner can allow it")
    return CheckpointError(f"{path}: damaged checkpoint ({error.strerror})")
