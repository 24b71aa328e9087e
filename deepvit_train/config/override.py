"""KEY=VALUE as it is typed: its check before Hydra reads it, text that Hydra must not read, and errors."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException

from deepvit_train.config.command import COMMANDS, console_name, groups_of, keys_of
from deepvit_train.config.preset import config_dir
from deepvit_train.error import ConfigError, nearest

# The types of keys that take any text.
TEXT = ("str", "str or null")


def check_overrides(command: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that names no key or choice, with the nearest that exists."""
    groups, keys = groups_of(command), [key.name for key in keys_of(COMMANDS[command])]
    sections = {name.rsplit(".", 1)[0] for name in keys if "." in name}
    for override in overrides:
        name, equals, value = override.lstrip("+~").partition("=")
        if not equals and not override.startswith("~"):
            raise ConfigError(f"{override}: not of the form key=value")
        if name in groups and value not in groups[name] and (name, value) != ("experiment", "null"):
            known = groups[name]
            raise ConfigError(f"{name}={value}: unknown{nearest(value, known)} (choices: {', '.join(known)})")
        if name not in {*keys, *groups, *sections}:
            tails = {key.rsplit(".", 1)[-1]: key for key in reversed([*keys, *groups])}
            guess = nearest(name, [*keys, *groups])
            if not guess and (tail := difflib.get_close_matches(name.rsplit(".", 1)[-1], tails, n=1)):
                guess = f"; did you mean '{tails[tail[0]]}'?"
            raise ConfigError(f"{name}: no such key{guess} ({console_name(command)} --help lists all)")


def take_texts(
    command: str, overrides: Sequence[str], *, sweeps: bool = False
) -> tuple[list[str], dict[str, str | None]]:
    """Part the overrides that Hydra reads from texts that it would read as something else, or not at all.

    Hydra's grammar makes a number of name=1e3, a list of data.root=/a,b and an error of data.root=/photos(2);
    here they are the text that was typed. Text that Hydra reads as text stays with Hydra: quotes, escapes and
    ${key} mean what they mean there. A key that has the name of a folder of configs/, such as
    deepvit-analyze's model, is taken as well: Hydra would look for a file of that folder.

    Args:
        sweeps: whether several values, as of name=a,b, are left to Hydra; else they are text, or an error.

    Returns the overrides for Hydra, and the value of each key that is taken. Raises ConfigError where an
    override is neither.
    """
    types = {key.name: key.type for key in keys_of(COMMANDS[command])}
    folders = {folder.name for folder in config_dir().iterdir() if folder.is_dir()} - set(groups_of(command))
    for_hydra: list[str] = []
    taken: dict[str, str | None] = {}
    for override in overrides:
        name, _, typed = override.partition("=")
        value = _as_hydra_reads(override)
        several = isinstance(value, Sweep)
        if types.get(name) in TEXT and not (several and sweeps):
            if not isinstance(value, str | None):
                taken[name] = typed
            elif name in folders:
                taken[name] = value
            else:
                for_hydra.append(override)
        elif isinstance(value, HydraException) or (several and not sweeps):
            raise _wrong_value(override, types)
        else:
            for_hydra.append(override)
    return for_hydra, taken


def _as_hydra_reads(override: str) -> object:
    """The value that Hydra's grammar gives an override, or the exception that it raises."""
    if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in override):
        raise ConfigError(f"{override!r}: can't be read: it holds control characters, or is no UTF-8")
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        return error


def _wrong_value(override: str, types: dict[str, str]) -> ConfigError:
    """What is said of a value that Hydra's grammar can't read, or reads as several values."""
    name, _, value = override.lstrip("+~").partition("=")
    if name not in types:
        return ConfigError(f"{override!r}: can't be read as key=value")
    if types[name].startswith("list") and not value.startswith("["):
        return ConfigError(f"{override}: must be {types[name]}; nearest: {name}=[{value}]")
    guess = nearest(value, types[name].split("|"))
    several = "" if guess or "," not in value else "; deepvit-train -m trains with each of several values"
    return ConfigError(f"{override}: must be {types[name]}{guess or several}")


def explained(command: str, overrides: Sequence[str], error: Exception) -> ConfigError:
    """Hydra's error in one line: the override it is about, and what that key takes."""
    cause = error.__cause__ or error
    types = {key.name: key.type for key in keys_of(COMMANDS[command])}
    name = getattr(error, "full_key", None) or getattr(cause, "full_key", None)
    if name not in types:
        return ConfigError(f"{' '.join(overrides)}: {str(cause).strip().splitlines()[0]}")
    given = next((override for override in overrides if override.lstrip("+").startswith(f"{name}=")), name)
    return _wrong_value(given, types)
