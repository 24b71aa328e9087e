"""Waiting for images: what is waited for, when it is said, and when it is given up."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from deepvit_train.console import console, one_line
from deepvit_train.data.index import ImageIndex
from deepvit_train.error import DataError, Interrupted, UserError

POLL_S = 0.5  # how often somebody who waits looks at signals and readers
SAID_AFTER_S = 30.0  # a wait as long as this is said, and again each time it has doubled
GIVEN_UP_AFTER_S = 300.0  # images that are gone for so long end the run
SHOWN = 3  # files in a line
IDLE = -1


class WaitInterrupted(Interrupted):
    """A signal asks for something while images are waited for. The wait can go on with the next call."""


class DataLost(DataError):
    """The images of a data set went away and did not come back."""


class LoaderLost(UserError):
    """A loader process died. The message says what may help."""


class Readers:
    """What each reader (a loader process, or the one thread without them) is at, in memory that all share.

    Args:
        count: how many readers there are.
    """

    def __init__(self, count: int) -> None:
        # An image's number and, if it can't be read because the data set is gone, the system's error number.
        self._slots = np.frombuffer(mmap.mmap(-1, 16 * count), np.int64).reshape(count, 2)
        self._slots[:] = IDLE, 0

    def begin(self, reader: int, image: int, error: int = 0) -> None:
        """Note which image a reader is at, and the error of a data set that is gone."""
        self._slots[reader, 1] = error
        self._slots[reader, 0] = image

    def end(self, reader: int) -> None:
        """Note that a reader has finished its batch."""
        self.begin(reader, IDLE)

    def busy(self) -> dict[int, tuple[int, int]]:
        """Return the image and the error number of each reader that is at one."""
        return {
            reader: (image, error)
            for reader, (image, error) in enumerate(self._slots.tolist())
            if image != IDLE
        }


def _never() -> int:
    return 0


@dataclass(frozen=True)
class Patience:
    """Who may interrupt a wait, and who is told of it.

    Args:
        interrupts: returns the number of a signal that asks for something, or 0.
        say: takes a line for the user.
    """

    interrupts: Callable[[], int] = _never
    say: Callable[[str], None] = console.print


class Wait:
    """One wait for a batch. `poll` is called every POLL_S while there is none."""

    def __init__(self, patience: Patience, readers: Readers, index: ImageIndex) -> None:
        self._patience = patience
        self._readers = readers
        self._index = index
        self._started = time.monotonic()
        self._say_at = SAID_AFTER_S
        self._seen: dict[int, tuple[int, float]] = {}  # by reader: its image, and since when it is at it
        self._gone_since: float | None = None

    def poll(self) -> None:
        """Say what is due. Raises WaitInterrupted, and DataLost for images that stay away."""
        if number := self._patience.interrupts():
            raise WaitInterrupted("interrupted while waiting for images", number)
        now, busy = time.monotonic(), self._readers.busy()
        self._seen = {
            reader: kept if (kept := self._seen.get(reader, (IDLE, now)))[0] == image else (image, now)
            for reader, (image, _) in busy.items()
        }
        self._look_for_lost({image: error for image, error in busy.values() if error}, now)
        waited = now - self._started
        if waited >= self._say_at and self._gone_since is None:
            self._say_at *= 2
            self._patience.say(f"waiting for images since {waited:.0f} s: {self._files(now)}")

    def _look_for_lost(self, lost: dict[int, int], now: float) -> None:
        if not lost:
            self._found_again()
            return
        image, error = next(iter(lost.items()))
        where = f"{one_line(self._index.path(image))}: can't be read ({os.strerror(error)})"
        if self._gone_since is None:
            self._gone_since = now
            self._patience.say(f"{where}: {self._folder} is gone; waiting {GIVEN_UP_AFTER_S:.0f} s for it")
        if now - self._gone_since >= GIVEN_UP_AFTER_S:
            raise DataLost(f"{where}, and {self._folder} was gone for {GIVEN_UP_AFTER_S:.0f} s")

    def _found_again(self) -> None:
        if self._gone_since is not None:
            self._gone_since = None
            self._patience.say(f"{self._folder} is back")

    def over(self) -> None:
        """Note that the batch has come."""
        self._found_again()

    @property
    def _folder(self) -> str:
        return one_line(str(self._index.folder))

    def _files(self, now: float) -> str:
        """Name the files that readers are at, first those that they are at for the longest time."""
        longest = sorted(self._seen.values(), key=lambda seen: (seen[1], seen[0]))
        half = [seen for seen in longest if now - seen[1] >= self._say_at / 4]
        names = [one_line(self._index.path(image)) for image, _ in (half or longest)[:SHOWN]]
        return ", ".join(names) or "no loader says which"
