"""Bad files of a run: each named once, counted, and too many of them the end of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import length_hint

from deepvit_train.console import amount
from deepvit_train.data.dataset import NONE_LEFT, NONE_NEAR, Batch
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError


class TooManyBadFiles(DataError):
    """More training images are bad than data.max_bad allows. Each was replaced, so the state is sound."""


class BadFiles:
    """Collects the bad files that batches report, over all ranks.

    `known` are those of the run so far, one line each; new ones are added to it.
    """

    def __init__(self, known: list[str], max_bad: int, world: World, say: Callable[[str], None]) -> None:
        self.known = known
        self.max_bad = max_bad
        self.world = world
        self.say = say
        self._new: set[str] = set()

    def note(self, lines: Iterable[str]) -> None:
        """Remember what this rank met; nothing is sent."""
        self._new |= set(lines) - set(self.known)

    def watch(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        """The same batches, their bad files noted on the way."""
        return _Watched(batches, self)

    def settle(self) -> int:
        """Share the new ones, name each once, and return how many there are; every rank must call it.

        Raises on every rank alike: DataError where no image is left; TooManyBadFiles for more than max_bad.
        Then the new ones are forgotten, so that a later start judges anew.
        """
        met = set(self.world.union(self._new))
        new = sorted(met - set(self.known) - {NONE_NEAR})
        self._new.clear()
        if NONE_LEFT in new:
            one = next(line for line in [*new, *self.known] if line != NONE_LEFT)
            raise DataError(f"every training image is bad; one of them: {one}")
        for line in new:
            self.known.append(line)
            self.say(f"bad image, replaced by the next one: {line}")
        if new and len(self.known) > self.max_bad:
            told = f"{amount(len(self.known), 'bad training image')}, more than data.max_bad={self.max_bad}"
            del self.known[-len(new) :]
            kind = DataError if NONE_NEAR in met else TooManyBadFiles
            raise kind(f"{told}; the last: {new[-1]}")
        return len(new)


class _Watched:
    def __init__(self, batches: Iterable[Batch], bad: BadFiles) -> None:
        self._batches = batches
        self._bad = bad

    def __length_hint__(self) -> int:
        return length_hint(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self._bad.note(batch.bad)
            yield batch
