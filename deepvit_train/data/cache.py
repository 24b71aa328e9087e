"""Indexes kept from one start to the next: listing a million files takes many seconds, asking a thousand
folders whether they changed takes none.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from deepvit_train.atomic import unfinished
from deepvit_train.error import DataError

VERSION = 2
# Clocks of file systems tick as rarely as every two seconds: a folder younger than that may change unseen.
COARSEST_TICK_S = 2.0

Stamp = tuple[str, int, int]
Arrays = dict[str, np.ndarray]
Names = dict[str, list[str]]
Listing = tuple[Arrays, Names, list[Stamp]]  # an index, and what tells whether it is still right


def cache_folder() -> Path:
    """Where data that can be made again is kept. Raises DataError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepvit_train"
    except RuntimeError:
        raise DataError("no home folder is known: set XDG_CACHE_HOME to a folder for caches") from None


def cache_file(*key: object) -> Path:
    """The file that keeps the index of these parameters."""
    name = hashlib.blake2b(repr((VERSION, *key)).encode(), digest_size=16).hexdigest()
    return cache_folder() / "index" / f"{name}.npz"


def stamp_of(folder: str) -> Stamp:
    """What tells whether entries came to a folder or left it: the times of its last changes."""
    status = os.stat(folder)  # noqa: PTH116 - Path costs as much again
    return folder, status.st_mtime_ns, status.st_ctime_ns


def read(file: Path) -> tuple[Arrays, Names] | None:
    """The arrays and names kept in a file, or None where there are none or a folder changed since."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if any(tuple(stamp) != stamp_of(stamp[0]) for stamp in about["stamps"]):
                return None
            return {name: kept[name] for name in about["arrays"]}, about["names"]
    # zipfile raises RuntimeErrors too, for a file that says it is encrypted or compressed in another way.
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None  # no file, or a damaged one: it is made again


def write(file: Path, arrays: Arrays, names: Names, stamps: list[Stamp], started: float) -> None:
    """Keep an index made since `started`, each folder stamped before it was listed.

    Nothing is kept where a folder had changed just before, or where the cache can't be written.
    """
    if max(max(times) for _, *times in stamps) / 1e9 > started - COARSEST_TICK_S:
        return
    about = json.dumps({"names": names, "stamps": stamps, "arrays": list(arrays)}).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = unfinished(file)
        try:
            with partial.open("xb") as opened:
                np.savez(opened, about=np.frombuffer(about, np.uint8), allow_pickle=False, **arrays)
            partial.replace(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError:
        return
