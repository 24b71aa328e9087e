"""Record what Python code asks of the file system, from the interpreter's own audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# Code outside Python, such as safetensors', raises no event, and neither does os.stat.
EVENTS = {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir"}

_listeners: list[tuple[str, Callable[[str], object]]] = []


@contextmanager
def watching(folder: Path, tell: Callable[[str], object]) -> Iterator[None]:
    """Call tell(path) before a path in the folder is opened, listed, made, moved or removed."""
    _install()
    listener = f"{folder.absolute()}/", tell
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@cache  # once a process: Python takes no hook back
def _install() -> None:
    sys.addaudithook(_hook)


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _listeners or event not in EVENTS:
        return
    named = arguments[1 if event == "os.symlink" else 0]  # of a link its own name, not where it leads
    if isinstance(named, str | os.PathLike):
        path = Path(os.fspath(named)).absolute()
        for folder, tell in list(_listeners):
            if f"{path}/".startswith(folder):
                tell(str(path))
