"""Which files are images by their names, and what is said of those that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from deepvit_train.console import one_line
from deepvit_train.data.decode import ENDINGS
from deepvit_train.error import nearest

OUTSIDE = " outside a class folder"  # follows the ending of an image that lies there
SHOWN = 8
# Asked for first: a list of a million names takes a tenth of a second less.
COMMON = (".jpg", ".JPEG", ".png", ".jpeg", ".JPG")
# What people call the split that is evaluated, the likeliest first.
EVALUATED = ("val", "valid", "validation", "test", "testing", "dev", "eval")


def is_image(name: str) -> bool:
    """Whether a file's name ends like that of an image that can be read, in any case."""
    return name.endswith(COMMON) or name[name.rfind(".") :].lower() in ENDINGS


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, with its dot: '.txt'; 'no ending'."""
    place = name.rfind(".")
    return one_line(name[place:].lower()) if place > 0 else "no ending"


def summed_up(left_out: Mapping[str, int]) -> str:
    """Counts of files by ending as text, the most frequent first: '12 .heic, 3 .txt'."""
    ranked = sorted(left_out.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = [f"{count:,} {ending}" for ending, count in ranked[:SHOWN]]
    rest = sum(count for _, count in ranked[SHOWN:])
    return ", ".join([*shown, f"{rest:,} with other endings"] if rest else shown)


def as_names(left_out: Counter[str]) -> list[str]:
    """Counts by ending as a list of text, to be kept in a cache file; the rarest of very many are dropped."""
    return [f"{count} {ending}" for ending, count in left_out.most_common(1000)]


def from_names(names: Iterable[str]) -> dict[str, int]:
    """The reverse of as_names."""
    parts = (name.partition(" ") for name in names)
    return {ending: int(count) for count, _, ending in parts}


def split_hint(split: str, present: Iterable[str]) -> str:
    """What helps where a split is missing and these are there, or an empty text."""
    present = [name for name in present if name != "train"]
    if split == "train":
        return nearest(split, present) and f"{nearest(split, present)} Rename it, or make train a link to it"
    by_name = {name.casefold(): name for name in reversed(present)}
    usual = next((by_name[name] for name in EVALUATED if name in by_name), None)
    return f"; data.split={usual} evaluates on that" if usual else nearest(split, present)
