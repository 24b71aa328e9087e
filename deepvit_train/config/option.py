"""One configuration key: its help line and its bounds, checked when the configuration becomes objects."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from deepvit_train.error import ConfigError, UserError, nearest

# Past this a number in a configuration is a slip of the hand, and would end in an allocation error.
LARGEST = 1e9
NAME_BYTES = 255  # of one name in a path, on every file system in use


def option(
    help: str,
    *,
    low: float | None = None,
    high: float = LARGEST,
    above: float | None = None,
    below: float = math.inf,
    path: type[UserError] | None = None,
) -> Any:
    """Declare a key. Bounds hold for each number in it: low <= value <= high, above < value < below.

    Args:
        path: of a key that holds a path: the error of a path that no system could follow.
    """
    metadata = {"help": help, "low": low, "high": high, "above": above, "below": below, "path": path}
    return field(metadata=metadata)


class Choice(StrEnum):
    """A key's closed set of values. Members are lower case: OmegaConf reads an enum by the member's name."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        members = list(cls.__members__)
        raise ConfigError(f"{value!r} is not one of {', '.join(members)}{nearest(str(value), members)}")


class Section:
    """Base of the configuration's dataclasses: checks every key against its bounds."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for key in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, key.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    _check_bounds(f"{self.prefix()}{key.name}", number, key.metadata)
        self.check()

    def check(self) -> None:
        """Raise ConfigError where several keys together can't be used."""

    def check_typed(self, typed: set[str]) -> None:
        """Raise ConfigError where a key that was typed on the command line, by dotted name, can't be used.

        What the files of configs/ say in its place is adapted instead.
        """

    def check_paths(self) -> None:
        """Raise the error of each key's kind where its path leads nowhere on any disk."""
        for key in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, key.name)
            if isinstance(value, Section):
                value.check_paths()
            elif value is not None and key.metadata["path"] is not None:
                _check_path(f"{self.prefix()}{key.name}", value, key.metadata["path"])

    @classmethod
    def prefix(cls) -> str:
        """What stands before a key's name in messages, as typed on the command line: `model.`."""
        return ""


def _check_bounds(name: str, number: float, bounds: Any) -> None:
    if not math.isfinite(number):
        raise ConfigError(f"{name}={number}: must be a finite number")
    low, above = bounds["low"], bounds["above"]
    if low is not None and number < low:
        raise ConfigError(f"{name}={number}: must be at least {low:g}")
    if above is not None and number <= above:
        raise ConfigError(f"{name}={number}: must be greater than {above:g}")
    if number > bounds["high"]:
        raise ConfigError(f"{name}={number}: must be at most {bounds['high']:g}")
    if number >= bounds["below"]:
        raise ConfigError(f"{name}={number}: must be less than {bounds['below']:g}")


def _check_path(name: str, path: str, error: type[UserError]) -> None:
    """Raise an error for an unknown user's home, a name that is too long, and links that go in a circle."""
    reason = None
    try:
        given = Path(path).expanduser()
    except RuntimeError as cause:  # the home of an unknown user
        raise error(f"{name}={path}: can't be used ({cause})") from None
    try:
        os.stat(given)  # noqa: PTH116 - raises where Path.exists only says no
    except OSError as cause:
        if cause.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = cause.strerror
        elif any(len(os.fsencode(part)) > NAME_BYTES for part in given.parts):
            reason = os.strerror(errno.ENAMETOOLONG)  # the system does not look behind a missing folder
    if reason is not None:
        shown = path if len(path) < 300 else f"{path[:60]}... ({len(path)} letters)"
        raise error(f"{name}={shown}: can't be used ({reason})")
