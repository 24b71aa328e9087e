"""Keep image files, or the pixels made of them, in memory once they were read, for all loaders of a rank.

The memory is allocated before the processes are forked, so they inherit it. The system gives a page of it
only when something is written there, so memory that is not needed costs nothing.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np


class KeptBytes:
    """The bytes of images, by their numbers. What does not fit is not kept.

    Args:
        images: how many images there are.
        limit: bytes that they may take.

    Raises OSError where the system does not allow so much.
    """

    def __init__(self, images: int, limit: int) -> None:
        self.limit = limit
        self._memory = mmap.mmap(-1, max(1, limit))
        # Of each image: where its bytes begin, how many they are (0: it is not kept), and their checksum.
        self._table = np.frombuffer(mmap.mmap(-1, max(1, images) * 24), np.int64).reshape(-1, 3)
        self._used = np.frombuffer(mmap.mmap(-1, 8), np.int64)
        self._lock = os.memfd_create("kept", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._lock)

    @property
    def used(self) -> int:
        """The bytes that are taken."""
        return int(self._used[0])

    def get(self, image: int) -> bytes | None:
        """Return the bytes of an image, or None where they are not kept."""
        start, size, checksum = self._table[image].tolist()
        if not size:
            return None
        data = self._memory[start : start + size]
        # Another process may be writing this row just now.
        return data if len(data) == size and zlib.crc32(data) == checksum else None

    def put(self, image: int, data: bytes) -> None:
        """Keep the bytes of an image, unless the memory is full."""
        with self._locked():
            start = self.used
            if start + len(data) > self.limit:
                return
            self._used[0] = start + len(data)
        self._memory[start : start + len(data)] = data
        self._table[image] = start, len(data), zlib.crc32(data)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The system releases a POSIX lock when its process is killed.
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)


class KeptPixels(NamedTuple):
    """The pixels that a transform without random draws made of images, and that transform."""

    transform: object
    pixels: KeptBytes


def free_memory() -> int:
    """Return the bytes that programs can still take: of the machine, or of this container if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    try:
        group = Path("/sys/fs/cgroup")
        most, now = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if most == "max" else max(0, min(free, int(most) - int(now)))
    except (OSError, ValueError):
        return free
