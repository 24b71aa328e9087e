"""KEY=VALUE as it is typed: its check before Hydra reads it, text that Hydra must not read, and errors."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Sweep
from hydra.errors import HydraException

from deepvit_train.config.command import COMMANDS, LIST, NAMED, console_name, groups_of, keys_of
from deepvit_train.config.listing import typed_list
from deepvit_train.config.shipped import config_dir
from deepvit_train.error import ConfigError, nearest, slips

# The types of keys that take any text.
TEXT = ("str", "str or null")
TEXTS = f"{LIST}str"
# What a command is about: a path without KEY= before it is the value of this key.
SUBJECTS = {
    "eval": "checkpoint",
    "predict": "checkpoint",
    "analyze": "checkpoint",
    "convert": "source",
    "export": "checkpoint",
    "data-check": "root",
    "study": "root",
    "compare": "runs",
}
# What a second path is most likely meant for.
SECOND = {
    "eval": "data.root",
    "predict": "images",
    "analyze": "compare",
    "convert": "out",
    "export": "out",
    "study": "out",
    "train": "data.root",
}
# Of these, which take several.
SEVERAL = {"compare"}


def with_subject(command: str, overrides: Sequence[str]) -> list[str]:
    """Put the name of its key before a path that was typed alone: `runs/demo` is `checkpoint=runs/demo`.

    Several paths of a command that takes them are a list, as JSON. No key holds a slash or a space, so
    `runs/lr=0.1` is a path too. Raises ConfigError for a second one where one is taken.
    """
    subject = SUBJECTS.get(command)
    bare = [each for each in overrides if _is_bare(each)]
    if subject is None or not bare:
        return list(overrides)
    if command in SEVERAL and len(bare) > 0 and not any(_is_of(each, subject) for each in overrides):
        rest = [each for each in overrides if not _is_bare(each)]
        return [f"{subject}={json.dumps(bare, ensure_ascii=False)}", *rest]
    if len(bare) > 1 or any(_is_of(each, subject) for each in overrides):
        raise ConfigError(f"{bare[-1]}: {subject} is given already{_meant(command, bare[-1])}")
    return [f"{subject}={each}" if _is_bare(each) else each for each in overrides]


def _meant(command: str, path: str) -> str:
    """What helps where a path was typed alone and has no key."""
    return f"; did you mean {SECOND[command]}={path}?" if command in SECOND else ""


def _is_of(override: str, key: str) -> bool:
    return override.lstrip("+").startswith(f"{key}=")


def _is_bare(override: str) -> bool:
    name, equals, _ = override.partition("=")
    is_key = re.fullmatch(r"[+~]*[A-Za-z_][\w.]*", name, flags=re.ASCII)
    return bool(override) and (not equals or is_key is None) and not override.startswith(("+", "~"))


def check_overrides(command: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that names no key or choice, with the nearest that exists."""
    groups, keys = groups_of(command), [key.name for key in keys_of(COMMANDS[command])]
    for override in overrides:
        name, equals, value = override.lstrip("+~").partition("=")
        if not equals and not override.startswith("~"):
            meant = _meant(command, override) if command == "train" and "/" in override else ""
            raise ConfigError(f"{override}: not of the form key=value{meant}")
        if name in groups and value not in groups[name] and (name, value) != ("experiment", "null"):
            known = groups[name]
            raise ConfigError(f"{name}={value}: unknown{nearest(value, known)} (choices: {', '.join(known)})")
        if name not in {*keys, *groups}:
            guess = _nearest_key(name, [*keys, *groups])
            raise ConfigError(f"{name}: no such key{guess} ({console_name(command)} --help lists all)")


def _nearest_key(name: str, keys: Sequence[str]) -> str:
    """`; did you mean 'X'?`, where the last part of a key is near; its section may be another one."""
    section, _, tail = name.rpartition(".")
    ranked = sorted(keys, key=lambda key: slips(section, key.rpartition(".")[0]))
    found = nearest(tail, [key.rpartition(".")[2] for key in ranked])
    meant = next((key for key in ranked if found == f"; did you mean '{key.rpartition('.')[2]}'?"), None)
    return f"; did you mean '{meant}'?" if meant else ""


def take_texts(
    command: str, overrides: Sequence[str], *, sweeps: bool = False
) -> tuple[list[str], dict[str, Any]]:
    """Part the overrides that Hydra reads from texts that it would read as something else, or not at all.

    Hydra's grammar makes a number of name=1e3, a list of data.root=/a,b and an error of data.root=/photos(2),
    and strips spaces; here they are the text that was typed. Text that Hydra reads as text stays with Hydra:
    quotes, escapes and ${key} mean what they mean there. A key that has the name of a folder of configs/,
    such as deepvit-analyze's model, is taken as well: Hydra would look for a file of that folder.
    So are lists of texts, which need no quotes inside: train=[model.depth=2,augment=none].
    Of a key that is given twice the last value counts, as with Hydra. Values under names are added to those
    of the files.

    Args:
        sweeps: whether several values, as of name=a,b, are left to Hydra; else they are text, or an error.

    Returns the overrides for Hydra, and the value of each key that is taken. Raises ConfigError where an
    override is neither.
    """
    types = {key.name: key.type for key in keys_of(COMMANDS[command])}
    folders = {folder.name for folder in config_dir().iterdir() if folder.is_dir()} - set(groups_of(command))
    for_hydra: list[str] = []
    taken: dict[str, Any] = {}
    for override in overrides:
        name, _, typed = override.partition("=")
        name = name.lstrip("+")
        if types.get(name) == TEXTS and (texts := _json_texts(typed)) is not None:
            taken[name] = texts
            continue
        value = _as_hydra_reads(override)
        several = isinstance(value, Sweep)
        if types.get(name) == TEXTS and (texts := typed_list(typed.strip())) is not None:
            taken.pop(name, None)
            taken[name] = texts
        elif types.get(name) in TEXT and not (several and sweeps):
            taken.pop(name, None)
            if "\\${" in typed:
                raise ConfigError(f"{override}: a text can't hold '${{'; ${{KEY}} is another key's value")
            if not isinstance(value, str | None) or typed != typed.strip():
                taken[name] = typed
            elif name in folders:
                taken[name] = value
            else:
                for_hydra.append(f"{name}={typed}")
        elif types.get(name) == NAMED and isinstance(value, dict):
            taken[name] = taken.get(name, {}) | value  # Hydra takes no name that the files of configs/ lack
        elif isinstance(value, HydraException) or (several and not sweeps):
            raise _wrong_value(override, types)
        else:
            for_hydra.append(override)
    return for_hydra, taken


def _json_texts(typed: str) -> list[str] | None:
    """Return a list of texts that was written as JSON, or None for anything else."""
    try:
        found = json.loads(typed)
    except ValueError:
        return None
    is_texts = isinstance(found, list) and all(isinstance(each, str) for each in found)
    return found if is_texts else None


def typed_text(override: str) -> str:
    """Return the text that an override gives its key, without the quotes that Hydra takes away."""
    value = _as_hydra_reads(override)
    return value if isinstance(value, str) else override.partition("=")[2]


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
    if types[name].startswith(LIST) and not value.startswith("["):
        return ConfigError(f"{override}: must be {types[name]}; nearest: {name}=[{value}]")
    guess = nearest(value, types[name].split("|"))
    several = "" if guess or "," not in value else "; deepvit-train -m trains with each of several values"
    return ConfigError(f"{override}: must be {types[name]}{guess or several}")


def explained(command: str, overrides: Sequence[str], error: Exception) -> ConfigError:
    """Hydra's error in one line: the override or the YAML file it is about, and what that key takes."""
    cause = error.__cause__ or error
    types = {key.name: key.type for key in keys_of(COMMANDS[command])}
    if in_file := re.match(r"In '([\w/]+)': (.*)", str(error), re.DOTALL):
        return _wrong_file(in_file[1], in_file[2], types)
    name = getattr(error, "full_key", None) or getattr(cause, "full_key", None)
    if name not in types:
        # Hydra does not say which override it is about. Most often it is one with ${KEY} in it.
        suspects = [override for override in overrides if "${" in override] or overrides
        return ConfigError(f"{' '.join(suspects)}: {str(cause).strip().splitlines()[0]}")
    given = next((override for override in overrides if override.lstrip("+").startswith(f"{name}=")), name)
    return _wrong_value(given, types)


def _wrong_file(name: str, told: str, types: dict[str, str]) -> ConfigError:
    """What is said of a YAML file of configs/ that Hydra can't use. `told` is what Hydra says, in lines."""
    file = config_dir() / f"{name}.yaml"
    lines = told.splitlines()
    said = lines[1] if "raised while composing" in lines[0] else lines[0]
    found = re.search(r"full_key: (\S+)", told)
    if found is None:
        return ConfigError(f"{file}: {said}")
    key = found[1]
    if key not in types:
        return ConfigError(f"{file}: {key}: no such key{_nearest_key(key, list(types))}")
    return ConfigError(f"{file}: {key}: {said} (must be {types[key]})")
