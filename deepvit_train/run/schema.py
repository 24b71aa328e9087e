"""What the JSON and YAML files of a run hold, and whether what was read is that.

A table names the keys that the code reads, each with the kind of its value. A key that ends in `?` may be
missing. Keys that no table names are let through: a later version may write more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit_train.error import CheckpointError


@dataclass(frozen=True)
class Kind:
    """A kind of value: its name in a message, and whether a value is of it."""

    name: str
    fits: Callable[[Any], bool]

    def __or__(self, other: Kind) -> Kind:
        return Kind(f"{self.name} or {other.name}", lambda value: self.fits(value) or other.fits(value))


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= 2**53)


def _is_setting(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_setting(each) for key, each in value.items())
    return all(map(SCALAR.fits, value if isinstance(value, list) else [value]))


ANY = "*"  # the one key of a table whose keys may be any
NULL = Kind("null", lambda value: value is None)
COUNT = Kind("a whole number from 0 on", lambda value: type(value) is int and 0 <= value <= 2**53)
NUMBER = Kind("a number", _is_number)  # the loss of an evaluation may be NaN or infinite
FINITE = Kind("a finite number", lambda value: _is_number(value) and math.isfinite(value))
POSITIVE = Kind("a positive number", lambda value: FINITE.fits(value) and value > 0)
TEXT = Kind("text", lambda value: isinstance(value, str))
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
PATH = Kind("a path", lambda value: isinstance(value, str) and 0 < len(value.encode(errors="replace")) < 4096)
DIGEST = Kind("a digest", lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]+", value)))
SCALAR = Kind("one value", lambda value: value is None or isinstance(value, (bool, str)) or _is_number(value))
SETTING = Kind("values under names", _is_setting)

# Of a checkpoint.
MANIFEST = {"format": COUNT, "sha256": {ANY: DIGEST}}
SCALER = {
    "scale": POSITIVE,
    "growth_factor": POSITIVE,
    "backoff_factor": POSITIVE,
    "growth_interval": COUNT,
    "_growth_tracker": COUNT,
}
SCHEDULE = {  # its length in steps; the step at which it was extended and the rate there
    "steps": COUNT,
    "rise": NULL
    | Kind("a step and a rate", lambda value: misfit(value, [FINITE]) is None and len(value) == 2),
}
BEST = {"step": COUNT, "val/top1": NUMBER, ANY: NUMBER}
RESUMED = {  # what training goes on with
    "scaler": Kind("a loss scaler", lambda value: value == {} or misfit(value, SCALER) is None),
    "scaler_skips": COUNT,
    "evaluated_step": COUNT | Kind("-1", lambda value: type(value) is int and value == -1),
    "metrics": {ANY: NUMBER},
    "best": Kind("an evaluation", lambda value: value == {} or misfit(value, BEST) is None),
    "bad_files": [TEXT],
}
STATE = {f"{key}?": kind for key, kind in RESUMED.items()} | {
    "format": COUNT,
    "step": COUNT,
    "class_weights?": NULL | Kind("numbers", lambda value: misfit(value, [POSITIVE]) is None),
    "teacher?": NULL | DIGEST,
    "worse?": COUNT,
    "hours?": Kind("hours", lambda value: FINITE.fits(value) and value >= 0),
    "losses?": [NUMBER],
    "loss_steps?": COUNT,
    "plain_losses?": [NUMBER],
    "learning_rate?": FINITE | NULL,
    "schedule?": NULL | Kind("a schedule", lambda value: misfit(value, SCHEDULE) is None),
    "data_root?": PATH | NULL,
    "class_map?": PATH | NULL,
    "data_keys?": {
        "split?": TEXT,
        "val_share?": NUMBER | NULL,
        "group_by?": TEXT | NULL,
        "classes?": TEXT | NULL,
        "empty_classes?": BOOL,
    },
    "images?": {ANY: {"images": COUNT, "digest": DIGEST, "bytes?": [NUMBER]}},
    "identity?": {"run": DIGEST, "name": TEXT, "config": SETTING, "classes": DIGEST},
    "rounding?": SETTING,
    "source?": {ANY: TEXT},
}
DESCRIPTION = {
    "format?": COUNT,
    "model": SETTING,
    "attn": SETTING,
    "classes?": Kind("names", lambda value: value is None or misfit(value, [TEXT]) is None),
    "data?": TEXT | NULL,
    "seed?": COUNT,
    "calibrate_images?": COUNT,
    "class_order?": TEXT | NULL,
    "value_range?": Kind(
        "null or two numbers",
        lambda value: value is None or (misfit(value, [FINITE]) is None and len(value) in (0, 2)),
    ),
}

# Of a run's folder.
CONFIG = {ANY: SETTING}
ENVIRONMENT = [SETTING]

# Of a study's folder.
AXES = [f"{maps}/{metric}/column" for maps in ("pre_mix", "post_norm") for metric in ("raw", "centred")]
OF_PRE_MIX = [f"{what}/{axis}" for what in ("similarity", "heads") for axis in AXES[:2]]
MEASURED = {
    "similar_blocks": {axis: {"count": NUMBER, "ratio": NUMBER, "to_previous": NUMBER} for axis in AXES},
    "by_block": {name: [NUMBER | NULL] for name in [*OF_PRE_MIX, "features", "tokens"]},
}
EVALUATED = {statistics: {"top1": NUMBER, "loss": NUMBER} for statistics in ("calibrated", "running")}
PLACE = {"name": TEXT, "status": TEXT, "attn": TEXT, "depth": COUNT, "dim": COUNT, "seed": COUNT}
FAILED_CELL = {"name": TEXT, "status": TEXT, "error": TEXT, "exit_code?": COUNT}
SEARCH_CELL = PLACE | {"rate": POSITIVE, "top1": NUMBER, "train_loss": NUMBER}
EARLY = Kind("the scalars of a look", lambda value: value is None or misfit(value, {ANY: NUMBER}) is None)
DONE_CELL = PLACE | {
    "rate?": POSITIVE | NULL,
    "early?": EARLY,
    "accuracy": EVALUATED,
    "train_loss": NUMBER,
    "trained": MEASURED,
    "untrained": MEASURED,
}


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Return in what a value does not fit a shape, or None if it fits.

    Args:
        shape: a kind; a table; or a list with the shape of every entry.
        place: where the value stands, for the message: 'best.step'.
    """
    if isinstance(shape, Kind):
        return None if shape.fits(value) else f"{place} is not {shape.name}"
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{place or 'the content'} is not a list"
        parts = [(str(number), each, shape[0]) for number, each in enumerate(value)]
    else:
        if not isinstance(value, dict):
            return f"{place or 'the content'} is not values under names"
        keys = {key.removesuffix("?"): key for key in shape}
        if missing := [key for name, key in keys.items() if key == name != ANY and name not in value]:
            return f"{place or 'the content'} has no {missing[0]}"
        parts = [(name, each, shape.get(keys.get(name, ANY))) for name, each in value.items()]
    found = (
        misfit(each, part, f"{place}.{name}".lstrip(".")) for name, each, part in parts if part is not None
    )
    return next((problem for problem in found if problem is not None), None)


def fitting(content: Any, shape: Any, file: Path) -> Any:
    """Return the content of a file. Raises CheckpointError if it does not fit the shape."""
    if (problem := misfit(content, shape)) is not None:
        raise CheckpointError(f"{file}: damaged ({problem})")
    return content
