"""Keep the index of a data set from one start to the next.

Listing a million files takes many seconds. To ask a thousand folders whether they have changed takes hardly
any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from deepvit_train.atomic import make_folder, replacing
from deepvit_train.error import DataError, OutputError

VERSION = 4
# Some file systems store times in steps of two seconds, so a change soon after another may leave no trace.
COARSEST_TICK_S = 2.0

Stamp = tuple[str, int, int]  # a folder, and the times of its last changes, ns
Arrays = dict[str, np.ndarray]
Names = dict[str, list[str]]
Listing = tuple[Arrays, Names, list[Stamp]]  # an index, and stamps that show whether it is still right


def cache_folder() -> Path:
    """Return the folder for data that can be made again. Raises DataError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepvit_train"
    except RuntimeError:
        raise DataError("no home folder is known: set XDG_CACHE_HOME to a folder for caches") from None


def cache_file(*key: object) -> Path:
    """Return the file that keeps the index made with these parameters."""
    name = hashlib.blake2b(repr((VERSION, *key)).encode(), digest_size=16).hexdigest()
    return cache_folder() / "index" / f"{name}.npz"


def stamp_of(folder: str) -> Stamp:
    """Return the times of a folder's last changes. They differ once an entry was added or removed."""
    status = os.stat(folder)  # noqa: PTH116 - Path would take twice the time
    return folder, status.st_mtime_ns, status.st_ctime_ns


def read(file: Path) -> tuple[Arrays, Names] | None:
    """Return the arrays and names kept in a file, or None if there are none or a folder has changed since."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            about = json.loads(kept["about"].tobytes())
            if any(tuple(stamp) != stamp_of(stamp[0]) for stamp in about["stamps"]):
                return None
            return {name: kept[name] for name in about["arrays"]}, about["names"]
    # zipfile raises RuntimeError too, for a file that claims to be encrypted or compressed in another way.
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None  # there is no file or a damaged one, so the index is made again


def write(file: Path, arrays: Arrays, names: Names, stamps: list[Stamp], started: float) -> None:
    """Keep an index in a file.

    Nothing is kept if a folder had changed just before, or if the file can't be written.

    Args:
        file: what `cache_file` returned.
        arrays, names: the index.
        stamps: a stamp of each folder, taken before the folder was listed.
        started: when the listing began, seconds since the epoch.
    """
    if max(max(times) for _, *times in stamps) / 1e9 > started - COARSEST_TICK_S:
        return
    about = json.dumps({"names": names, "stamps": stamps, "arrays": list(arrays)}).encode()
    try:
        make_folder(file.parent)
        with replacing(file, flush=False) as opened:
            np.savez(opened, about=np.frombuffer(about, np.uint8), allow_pickle=False, **arrays)
    except (OSError, OutputError):
        return
