"""Writes files and folders so that they are there whole or not at all, whenever a kill comes."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from deepvit_train.error import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a small file, in the place of an older one if there is one. Raises OutputError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OutputError(f"{path}: can't be written ({error.strerror})") from None


def unfinished(target: Path) -> Path:
    """Return a name that nothing has yet, for what becomes `target` by a rename.

    It lies beside the target, so that the rename stays on one file system. What is made under it has the mode
    that the umask says, where those of `tempfile` let in their owner alone.
    """
    return target.with_name(f".{target.name}-{secrets.token_hex(4)}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to write into. It gets the name `out` at the end, if nothing went wrong inside.

    Raises OutputError if `out` holds something already, if it can't be written, or for an OSError inside.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"out={out}: holds something already; name a new folder or empty it")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = unfinished(out)
        partial.mkdir()
        try:
            yield partial
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"out={out}: can't be written ({error.strerror})") from None


@contextmanager
def open_new(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Give a file to write into, which gets its name at the end, if nothing went wrong inside.

    It takes the place of an older one. Raises OutputError if it can't be written, or for an OSError inside.
    """
    partial = unfinished(path)
    encoding = None if "b" in mode else "utf-8"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open(mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"out={path}: can't be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            partial.unlink()
