"""Every file and folder is written here: whole or not at all, and never where a link leads.

A kill at any moment leaves the old file or the new one. Only the folder that the user named may be a link, or
lie under one. What lies inside it may come from a stranger, so a link there is refused and named.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TextIO

from deepvit_train.error import OutputError
from deepvit_train.reading import what_lies_at


class RefusedError(OutputError):
    """Something else lies where a file or a folder of the program belongs: a link, a pipe, a device."""


def write_text(path: Path, text: str) -> None:
    """Write a small file, in the place of an older one if there is one. Raises OutputError."""
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))


@contextmanager
def replacing(path: Path, flush: bool = True) -> Iterator[BinaryIO]:
    """Give a file that gets the name `path` at the end, and is on the disk then with `flush`.

    Raises OutputError, also for an OSError inside. Then the older file stays.
    """
    with _becoming(path, stat.S_ISREG) as partial, create(partial) as file:
        yield file
        if flush:
            file.flush()
            os.fsync(file.fileno())


def place_link(link: Path, target: str) -> None:
    """Let a link lead to a target, in one step, in the place of an older link. Raises OutputError."""
    with _becoming(link, lambda mode: stat.S_ISREG(mode) or stat.S_ISLNK(mode)) as partial:
        partial.symlink_to(target)


@contextmanager
def _becoming(path: Path, fits: Callable[[int], bool]) -> Iterator[Path]:
    """Give a name for a new file or link. At the end it takes the name `path` from what fits."""
    partial = unfinished(path)
    try:
        _refuse_unless(fits, path)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def create(path: Path) -> BinaryIO:
    """Open a new file. Raises OSError, also where anything has the name already."""
    return os.fdopen(_open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")


def append(path: Path) -> TextIO:
    """Open a file to add lines at its end; each is written at once. Raises OSError or RefusedError."""
    return os.fdopen(open_end(path), "a", buffering=1, encoding="utf-8", errors="backslashreplace")


def open_end(path: Path) -> int:
    """Do the same as `append`, and return a descriptor."""
    _refuse_unless(stat.S_ISREG, path)
    descriptor = _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise RefusedError(f"{path}: the same file has another name elsewhere; replace it by a copy")
    return descriptor


def open_lock(path: Path) -> int:
    """Open a file to lock, made if it is missing, and return its descriptor. Raises as `append` does."""
    _refuse_unless(stat.S_ISREG, path)
    return _open(path, os.O_RDWR | os.O_CREAT)


def inside(folder: Path, *names: str) -> Path:
    """Return the path of a folder below a folder. Raises RefusedError if one of the names is a link."""
    for name in names:
        folder = folder / name
        _refuse_unless(lambda mode: not stat.S_ISLNK(mode), folder)
    return folder


def make_folder(folder: Path, *names: str) -> Path:
    """Make a folder with its parents, and these one below the other; return the last. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder = folder / name
        _refuse_unless(stat.S_ISDIR, folder)
        folder.mkdir(exist_ok=True)
    return folder


def unfinished(target: Path) -> Path:
    """Return a name beside a target that nothing has and nobody can foresee, for what becomes the target."""
    return target.with_name(f".{secrets.token_hex(8)}.partial")


@contextmanager
def new_folder(out: Path, key: str = "out") -> Iterator[Path]:
    """Give a folder to write into, which gets the name `out` at the end. Raises OutputError.

    Args:
        key: what the user calls the folder.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"{key}={out}: holds something already; name a new folder or empty it")
        make_folder(out.parent)
        partial = unfinished(out)
        partial.mkdir()
        try:
            yield partial
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"{key}={out}: can't be written ({error.strerror})") from None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds, if it is there. No link is followed."""
    shutil.rmtree(path, ignore_errors=True)  # of a folder alone
    with suppress(OSError):
        path.unlink()


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def _refuse_unless(fits: Callable[[int], bool], path: Path) -> None:
    """Raise RefusedError if there is something at the path whose mode does not fit."""
    with suppress(FileNotFoundError):
        if not fits(path.lstat().st_mode):
            raise RefusedError(f"{path}: is {what_lies_at(path)}; nothing is written there, so remove it")
