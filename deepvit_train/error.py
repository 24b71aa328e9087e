"""Errors a user can cause or mend. Each class is one exit code of the commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Shown without a traceback: one or two lines saying what, which value, and the nearest valid one."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A key, choice or combination of values that can't be used."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint or weights file that is missing, damaged or does not fit."""

    exit_code = 3


class DataError(UserError):
    """A data folder or an image that can't be used."""

    exit_code = 4


class NotFiniteError(UserError):
    """The loss or the gradient norm became NaN or infinite."""

    exit_code = 5


class OutputError(UserError):
    """The run folder can't be made, locked or written."""

    exit_code = 6


class Collapsed(UserError):
    """More blocks became similar than collapse.stop_above allows."""

    exit_code = 7


class Interrupted(UserError):
    """A stop signal arrived; the state was saved first. The exit code is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known word most like `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
