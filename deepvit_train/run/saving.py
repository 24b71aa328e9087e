"""Checkpoints are written beside training: a snapshot is taken at once, and a thread writes it to the disk.

A checkpoint is written under a temporary name, flushed to the disk and renamed. So it is there whole or not
at all, whenever a kill comes.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deepvit_train.atomic import create, place_link, remove
from deepvit_train.distributed.parallel import whole
from deepvit_train.error import CheckpointError, OutputError
from deepvit_train.reading import open_file
from deepvit_train.run.checkpoint import (
    FORMAT,
    MANIFEST,
    STATE,
    as_json,
    checkpoints_in,
    digest_of,
    signed,
)
from deepvit_train.run.copied import settle_copies
from deepvit_train.run.link import SET_ASIDE, target_of

TEMPORARY = ".partial-"


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be written: tensors by name, and the metadata of its header."""

    tensors: dict[str, Tensor]
    header: dict[str, str] | None = None

    def snapshot(self) -> TensorFile:
        """Copy the tensors to the CPU as they are now. All ranks must do so if the tensors are sharded."""
        copies = {key: whole(value.detach()).to("cpu", copy=True) for key, value in self.tensors.items()}
        return TensorFile(copies, self.header)


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread, lets `last` and `best` lead to it, and prunes older ones.

    A kill at any moment leaves whole checkpoints. The one that was being written may be missing.

    Args:
        check: raises OutputError where the folder may not be written any more. Called before anything is
            written, before a checkpoint gets its name, before a link leads to it, and before older ones go.
    """

    def __init__(self, folder: Path, keep_last: int, check: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self._check = check
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def save(self, step: int, files: dict[str, TensorFile], state: dict[str, Any], best: bool) -> None:
        """Take a snapshot of the tensors and the state, and begin to write it as a checkpoint.

        First waits for the checkpoint before. Raises OutputError if that one could not be written.
        """
        self.wait()
        self._submit(step, files, state, best, completes=False)

    def complete(self, step: int, files: dict[str, TensorFile], state: dict[str, Any], best: bool) -> None:
        """Begin to add files to the newest checkpoint, that of this step, and to replace its state.

        Does not wait for the save before. The tensors that the checkpoint holds are not written again.
        """
        self._submit(step, files, state, best, completes=True)

    def _submit(
        self, step: int, files: dict[str, TensorFile], state: dict[str, Any], best: bool, completes: bool
    ) -> None:
        snapshot = {name: file.snapshot() for name, file in files.items()}
        plain = json.loads(json.dumps(state))
        self._pending.append(self._thread.submit(self._write, step, snapshot, plain, best, completes))

    def wait(self) -> None:
        """Wait until everything is on the disk. Raises OutputError if it could not be written."""
        pending, self._pending = self._pending, []
        for each in pending:
            each.result()

    def close(self) -> None:
        """Wait for the write under way and end the thread. Only `wait` raises the error of a write."""
        self._thread.shutdown(wait=True)

    def newest(self) -> Path | str:
        """Return the newest checkpoint on the disk, for a message."""
        self.wait()
        return (checkpoints_in(self.folder) or ["none"])[-1]

    def _write(
        self, step: int, files: dict[str, TensorFile], state: dict[str, Any], best: bool, completes: bool
    ) -> None:
        self._check()
        if not completes:
            remove_evaluations(self.folder, f"step_{step:07d}")  # of a checkpoint whose place this one takes
        written = write_checkpoint(self.folder, step, files, state, completes, self._check)
        self._check()
        point(self.folder, "last", written)
        if best:
            point(self.folder, "best", written)
        self._check()
        prune(self.folder, self.keep_last, written, keep={target_of(self.folder / "best")})


def write_checkpoint(
    folder: Path,
    step: int,
    files: dict[str, TensorFile],
    state: dict[str, Any],
    completes: bool = False,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Write folder/step_NNNNNNN. If that fails, raises OutputError and leaves nothing half-written.

    The folder must be there: where it was removed, it is not made again.

    Args:
        completes: take over the tensors that the checkpoint of this step holds already.
        check: raises OutputError where the folder may not be written any more. Called once all is written:
            until then another run may have begun under the folder's name.
    """
    target = folder / f"step_{step:07d}"
    partial = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        partial.mkdir()
        digests = _take_over(target, partial) if completes else {}
        for name, file in files.items():
            contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in file.tensors.items()}
            save_tensors(contiguous, partial / f"{name}.safetensors", file.header)
        _write_json(partial / STATE, {"format": FORMAT, "step": step, **state})
        new = [path for path in sorted(partial.iterdir()) if path.name not in digests]
        digests |= {path.name: digest_of(path, flush=True) for path in new}
        _write_json(partial / MANIFEST, {"format": FORMAT, "sha256": digests})
        digest_of(partial / MANIFEST, flush=True)
        _flush(partial)
        check()
        before = set_aside(target)
        partial.rename(target)
        _flush(folder)
        remove(before)
    except (OSError, SafetensorError, CheckpointError) as error:
        need = sum(tensor.nbytes for file in files.values() for tensor in file.tensors.values())
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        remove(partial)
        raise OutputError(
            f"{target}: can't write the checkpoint ({error}); it needs {need / 2**20:.1f} MiB, "
            f"{free / 2**20:.1f} MiB are free"
        ) from None
    except OutputError:
        remove(partial)
        raise
    return target


def _take_over(target: Path, partial: Path) -> dict[str, str]:
    """Link the tensors of a checkpoint into the one that will take its place. Returns their digests."""
    before = target if target.exists() else target.with_name(f"{target.name}{SET_ASIDE}")
    digests = signed(before)
    del digests[STATE]
    for name in digests:
        try:
            (partial / name).hardlink_to(before / name)
        except OSError:  # some file systems have no hard links
            with open_file(before / name) as original, create(partial / name) as copy:
                shutil.copyfileobj(original, copy)
            _flush(partial / name)
    return digests


def save_tensors(tensors: dict[str, Tensor], file: Path, header: dict[str, str] | None) -> None:
    """Write a new safetensors file. Raises OSError or SafetensorError.

    The library lets its owner alone read it. It gets the mode of any new file here, as the umask says.
    """
    create(file).close()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata=header)
    if stat.S_IMODE(file.stat().st_mode) != mode:
        with suppress(OSError):  # a file system without modes
            file.chmod(mode)


def set_aside(target: Path) -> Path:
    """Rename an older checkpoint of the same step, if there is one, and return the name it gets.

    It can still be found, so that a kill before the new one is in its place loses nothing.
    """
    before = target.with_name(f"{target.name}{SET_ASIDE}")
    if target.exists():
        remove(before)
        target.rename(before)
    return before


def point(folder: Path, name: str, target: Path) -> None:
    """Let the link folder/name lead to a checkpoint of the same folder, in one atomic step."""
    settle_copies(folder)
    place_link(folder / name, target.name)
    _flush(folder)


def finish_save(newest: Path, best: dict[str, float]) -> None:
    """Do what a kill prevented after the newest checkpoint got its name: links, and what is left over.

    Args:
        newest: the newest checkpoint.
        best: what its state says of the best evaluation; empty if there was none.
    """
    folder = newest.parent
    wanted = {"last": newest}
    if best:
        wanted["best"] = folder / f"step_{int(best['step']):07d}"
    for name, target in wanted.items():
        if target.is_dir() and target_of(folder / name) != target.name:
            point(folder, name, target)
    remove(newest.with_name(f"{newest.name}{SET_ASIDE}"))
    _remove_partial(folder)


def prune(folder: Path, keep_last: int, written: Path, keep: set[str]) -> None:
    """Delete old checkpoints and what broken saves left.

    What stays is the `keep_last` newest ones, counted back from the one just written, and those named in
    `keep`. A checkpoint of a later step than the one just written also stays, and does not count. It is
    damaged, or else the run would have been resumed from it.
    """
    found = checkpoints_in(folder)
    for path in found[: found.index(written) + 1][:-keep_last]:
        if path.name not in keep:
            remove(path)
            remove_evaluations(folder, path.name)
    _remove_partial(folder)


def remove_evaluations(folder: Path, name: str) -> None:
    """Delete the results of deepvit-eval that are about a checkpoint, which is no more or is replaced."""
    for file in folder.glob(f"{name}.*.json"):
        file.unlink(missing_ok=True)


def _remove_partial(folder: Path) -> None:
    links = [path for path in folder.glob(".*.partial") if path.is_symlink()]
    for path in [*folder.glob(f"{TEMPORARY}*"), *links]:
        remove(path)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with create(path) as file:
        file.write(as_json(content).encode())
