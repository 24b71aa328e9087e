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
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deepvit_train.error import CheckpointError, nearest
from deepvit_train.reading import ContentError, open_file, parse_json, read_bytes, read_yaml, what_lies_at
from deepvit_train.run import hub, schema
from deepvit_train.run.identity import ForeignError, Identity, check_place, read_identity
from deepvit_train.run.link import FOLDER, NAME, SET_ASIDE, check_folder, check_links, leads_to
from deepvit_train.run.tensor import check_fit, read_tensors

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
CALIBRATED = "calibrated.safetensors"
STATISTIC = re.compile(r"blocks\.\d+\.attn\.norm\.running_(?:mean|var)", re.ASCII)
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
        label: what results about a file of the hub are named after, 'ORG--NAME'; None for a file of the user.
    """

    file: Path
    folder: Path | None
    run: Path | None
    kind: str
    label: str | None = None

    def calibrated(self, model: nn.Module | None = None) -> dict[str, Tensor] | None:
        """Return the calibrated statistics of these weights, or None if there are none.

        Raises CheckpointError where they are not those of the model's BatchNorms.
        """
        found = None if self.folder is None else read_calibrated(self.folder).get(self.kind)
        if found is not None and model is not None:
            check_statistics(model, found, self.file.with_name(CALIBRATED))
        return found

    def data_path(self, key: str) -> str | None:
        """Return the path that the run's data had for a key, or None if that is not known.

        Args:
            key: 'data_root' for the folder of its images, 'class_map' for the file of their classes.
        """
        path = None if self.folder is None else read_state(self.folder).get(key)
        return None if path is None else str(path)

    def data_keys(self) -> dict[str, Any]:
        """Return what else the run said of which images its data set consists of: {'val_share': 0.1}."""
        return {} if self.folder is None else read_state(self.folder).get("data_keys", {})

    def split(self) -> str | None:
        """Return the name of the split that the run evaluated, or None if that is not known.

        A checkpoint of an earlier version does not keep it; the configuration of its run does.
        """
        if (kept := self.data_keys().get("split")) is not None:
            return kept
        try:
            said = None if self.run is None else read_yaml(self.run / "config.yaml")["data"]["split"]
        except (OSError, CheckpointError, KeyError, TypeError):
            return None
        return said if isinstance(said, str) else None

    @property
    def home(self) -> Path:
        """The folder to make for results about a weights file on its own, beside it."""
        return self.file.with_suffix("") if self.label is None else Path(self.label)

    def beside(self, ending: str) -> Path:
        """Return the path for a result: beside the checkpoint's folder, or beside a weights file.

        Of a file of the hub it is in the working folder: the hub's cache is no place for results.
        """
        if self.label is not None:
            return Path(f"{self.label}.{ending}")
        subject = self.file if self.folder is None else self.folder.resolve()
        return subject.with_name(f"{subject.name}.{ending}")


def find(
    path: str, weights: str = "auto", prefer: str = "best", key: str = "checkpoint", download: bool = False
) -> Found:
    """Find the weights file that a path means. The checkpoint that was chosen for it is verified.

    Args:
        path: a weights file; a folder of deepvit-convert; a checkpoint; a run, which stands for its best
            checkpoint, or for its newest whole one if it has no best one; or hf:ORG/NAME[@REVISION].
        weights: 'live', 'ema', or 'auto' for the averaged weights where a checkpoint has both.
        prefer: 'best', or 'last' if a run is to stand for its newest whole checkpoint.
        key: the key that the path was given by, for messages.
        download: whether a file of the hub that is not in its cache is fetched.

    Raises CheckpointError.
    """
    try:
        if (repository := hub.parse(path)) is not None:
            return Found(hub.weights_file(repository, download), None, None, "live", repository.label)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{key}={path}: {error}") from None
    try:
        given = _followed(Path(path).expanduser())
        return _found_at(given, weights, prefer, key)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"{key}={path}: can't be read ({reason})") from None


def _found_at(given: Path, weights: str, prefer: str, key: str) -> Found:
    check_links(given.parent if given.is_file() else given)
    if given.is_file():
        if (given.parent / MANIFEST).exists():
            verify(given.parent)
        return _found(given)
    if given.exists() and not given.is_dir():
        raise CheckpointError(f"{key}={given}: is {what_lies_at(given)}, not a file or a folder")
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
    folder = given if given.name == FOLDER else given / FOLDER
    check_folder(folder)
    if prefer == "best" and (best := leads_to(folder, "best")) is not None:
        verify(best)
        check_place(folder / "best", read_state(best))
        return best.resolve()
    problems: list[str] = []
    newest = newest_valid(folder, problems.append)
    if newest is None:
        raise CheckpointError(
            problems[0] if problems else f"{key}={given}: holds no checkpoint (looked in {folder})"
        )
    return newest


def _weights_in(folder: Path, weights: str) -> Path:
    """Return the file of a checkpoint that holds the weights asked for. Its manifest lists it."""
    names = signed(folder)
    present = {
        kind: folder / name for kind, stem in WEIGHT_FILES.items() if (name := f"{stem}.safetensors") in names
    }
    kind = ("ema" if "ema" in present else "live") if weights == "auto" else weights
    if kind not in present:
        raise CheckpointError(f"{folder}: holds no {kind} weights; nearest: weights=auto")
    return present[kind]


def _found(file: Path) -> Found:
    folder = file.parent if (file.parent / MANIFEST).exists() and file.name in signed(file.parent) else None
    run = None
    if folder is not None and (parent := folder.resolve().parent).name == FOLDER:
        run = parent.parent
    return Found(file, folder, run, "ema" if file.stem == WEIGHT_FILES["ema"] else "live")


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
