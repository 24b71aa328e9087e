"""Files and folders that are there whole or not at all, whenever a kill comes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deepvit_train.error import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a small file, or put it in the place of another. Raises OutputError."""
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


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which is called `out` once all went well.

    Raises OutputError where `out` holds something already or can't be written, and for an OSError inside.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"out={out}: holds something already; name a new folder or empty it")
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename stays on one file system.
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
        try:
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it the owner's alone
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"out={out}: can't be written ({error.strerror})") from None
