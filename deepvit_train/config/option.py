"""One configuration key: its help line and its bounds, checked when the configuration becomes objects."""

from __future__ import annotations

import math
from dataclasses import field, fields
from enum import StrEnum
from typing import Any

from deepvit_train.error import ConfigError, nearest

# Past this a number in a configuration is a slip of the hand, and would end in an allocation error.
LARGEST = 1e9


def option(
    help: str,
    *,
    low: float | None = None,
    high: float = LARGEST,
    above: float | None = None,
    below: float = math.inf,
) -> Any:
    """Declare a key. Bounds hold for each number in it: low <= value <= high, above < value < below."""
    return field(metadata={"help": help, "low": low, "high": high, "above": above, "below": below})


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
