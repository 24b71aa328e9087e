"""Class names: the orders in which programs number them, and how one list of them differs from another.

A class is a number to a model: the place of one of its outputs. So the names of its outputs, in order, are
part of a model, and a data set is matched to them by name.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from deepvit_train.console import amount, first_of
from deepvit_train.error import CheckpointError, DataError
from deepvit_train.reading import read_bytes

# The two usual orders. ImageFolder of torchvision sorts names by code point: "10" before "9", "Z" before "a".
TORCHVISION = "torchvision"
# timm reads numbers as numbers and takes no notice of case: "9" before "10", "a" before "Z".
TIMM = "timm"
ORDERS = (TORCHVISION, TIMM)
SHOWN = 5  # names of a list in a message


def ordered(names: Iterable[str], order: str) -> list[str]:
    """Return class names in torchvision's order or in timm's."""
    return sorted(sorted(names), key=_natural_key) if order == TIMM else sorted(names)


def _natural_key(name: str) -> list[str | int]:
    """Return what timm.utils.natural_key sorts by: text and numbers in turn."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def read_names(file: str, outputs: int) -> list[str]:
    """Read the names of a model's outputs, one a line. Raises DataError if they are not that many."""
    names = _lines(f"classes={file}", file)
    if len(names) != outputs:
        raise DataError(
            f"classes={file}: holds {len(names)} names, but the model has {amount(outputs, 'output')}"
        )
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"classes={file}: names {twice!r} twice")
    return names


def read_map(file: str) -> dict[str, str]:
    """Read which class the images of a folder are of: lines `folder: class`. Raises DataError."""
    found: dict[str, str] = {}
    for line in _lines(f"data.class_map={file}", file):
        folder, colon, name = line.partition(": ")
        if not (colon and folder.strip() and name.strip()):
            raise DataError(f"data.class_map={file}: {line!r} is not of the form 'folder: class'")
        if folder.strip() in found:
            raise DataError(f"data.class_map={file}: names the folder {folder.strip()!r} twice")
        found[folder.strip()] = name.strip()
    return found


def read_chosen(chosen: str, listed: list[str] | None) -> list[str]:
    """Return the classes that data.classes names. Raises DataError.

    Args:
        chosen: the key's value.
        listed: the names in it, or None where it is a file with one a line.
    """
    names = _lines(f"data.classes={chosen}", chosen) if listed is None else listed
    if not all(names) or not names:
        raise DataError(f"data.classes={chosen}: names no class; nearest: data.classes=null")
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise DataError(f"data.classes={chosen}: names {twice!r} twice")
    return names


def read_numbers(key: str, file: str) -> dict[str, float]:
    """Read a number for each class: lines `class: number`. Raises DataError, naming the key."""
    found: dict[str, float] = {}
    for line in _lines(key, file):
        name, colon, number = line.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (colon and name.strip() and math.isfinite(value)):
            raise DataError(f"{key}: {line!r} is not of the form 'class: number'")
        if name.strip() in found:
            raise DataError(f"{key}: names the class {name.strip()!r} twice")
        found[name.strip()] = value
    return found


def _lines(key: str, file: str) -> list[str]:
    """Read the lines of a text file, without those that are empty."""
    try:
        text = read_bytes(Path(file).expanduser(), follow=True).decode("utf-8-sig")
    except CheckpointError as error:  # a checkpoint may name the file
        raise DataError(f"{key}: can't be read ({error})") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        raise DataError(f"{key}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{key}: can't be read (not UTF-8 text)") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def difference(names: Sequence[str], known: Sequence[str], subset: bool = False) -> str:
    """Say how the class names of a data set differ from those known to a model; '' if they do not.

    Args:
        names: of the data set.
        known: of the model's outputs.
        subset: whether the data set may lack some of them.
    """
    missing = [] if subset else sorted(set(known) - set(names))
    unknown = sorted(set(names) - set(known))
    parts = []
    if unknown:
        parts.append(f"unknown to the model: {first_of([_beside(name, known) for name in unknown], SHOWN)}")
    if missing:
        parts.append(f"missing: {first_of([_told_apart(name, unknown) for name in missing], SHOWN)}")
    return "; ".join(parts)


def _beside(name: str, known: Sequence[str]) -> str:
    """Return a name, with the known one that is most like it: `Ant (nearest: ant)`."""
    folded = {_folded(each): each for each in known}
    like = folded.get(_folded(name))
    if like is None:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.75) if len(known) <= 2000 else []
        return f"{name} (nearest: {close[0]})" if close else name
    return f"{_told_apart(name, [like])} (nearest: {_told_apart(like, [name])})"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _told_apart(name: str, others: Sequence[str]) -> str:
    """Return a name; escaped where another looks the same, being of another Unicode form."""
    same = (unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", other) for other in others)
    return ascii(name) if any(same) else name


def shortened(names: Sequence[str]) -> str:
    """Return the first names of a list, for a message that compares orders."""
    return f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
