"""Whole commands: their typed configuration, composed from configs/*.yaml and the command line by Hydra."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, cast, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepvit_train.config.alias import current_override
from deepvit_train.config.bench import BenchConfig
from deepvit_train.config.command import (
    AnalyzeConfig,
    ConvertConfig,
    DataCheckConfig,
    DataDemoConfig,
    DataFashionMnistConfig,
    EvalConfig,
    TrainConfig,
)
from deepvit_train.config.option import Section
from deepvit_train.config.preset import choices, config_dir
from deepvit_train.config.study import StudyConfig
from deepvit_train.error import ConfigError, nearest

COMMANDS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "convert": ConvertConfig,
    "bench": BenchConfig,
    "data-check": DataCheckConfig,
    "analyze": AnalyzeConfig,
    "study": StudyConfig,
    "data-demo": DataDemoConfig,
    "data-fashion-mnist": DataFashionMnistConfig,
}


def console_name(command: str) -> str:
    """A command as it is typed: `deepvit-data demo` for data-demo."""
    return f"deepvit-{command.replace('-', ' ', 1)}"


def compose_command(command: str, overrides: Sequence[str]) -> Any:
    """The checked configuration of a command, as dataclasses.

    Raises ConfigError naming the key, the value and the nearest valid one.
    """
    composed = compose_tree(command, overrides)
    missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} is not given: add {missing[0]}=VALUE")
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise _explained(command, overrides, error) from None


def compose_tree(command: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration as Hydra composes it, typed but not yet checked. Raises ConfigError."""
    overrides = [current_override(each) for each in overrides]
    _check_overrides(command, overrides)
    store = ConfigStore.instance()
    for name, schema in COMMANDS.items():
        store.store(name=f"{name}_schema", node=schema)
    texts = _texts_named_as_groups(command, overrides)
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            tree = compose(command, overrides=[each for each in overrides if each not in texts])
        for name, value in (text.split("=", 1) for text in texts):
            OmegaConf.update(tree, name, None if value == "null" else value)
        OmegaConf.resolve(tree)
        return tree
    except (HydraException, OmegaConfBaseException) as error:
        raise _explained(command, overrides, error) from None


def _texts_named_as_groups(command: str, overrides: Sequence[str]) -> list[str]:
    """Overrides such as deepvit-analyze's model=timm:NAME, which Hydra takes for one of configs/model."""
    keys = {key.name for key in keys_of(COMMANDS[command])}
    folders = {folder.name for folder in config_dir().iterdir() if folder.is_dir()} - set(groups_of(command))
    return [each for each in overrides if (name := each.partition("=")[0]) in keys and name in folders]


def as_yaml(tree: Any) -> str:
    """A composed or checked configuration as YAML text."""
    config = tree if isinstance(tree, DictConfig) else OmegaConf.create(plain(tree))
    return OmegaConf.to_yaml(config)


def plain(value: Any) -> Any:
    """A configuration as nested dicts, lists and scalars."""
    if is_dataclass(value):
        return {key.name: plain(getattr(value, key.name)) for key in fields(value)}
    return value.value if isinstance(value, Enum) else value


def flat_values(tree: DictConfig, prefix: str = "") -> dict[str, Any]:
    """A composed configuration's values by dotted key, without those that must be given."""
    flat: dict[str, Any] = {}
    for name in tree:
        if OmegaConf.is_missing(tree, name):
            continue
        value, key = tree[name], f"{prefix}{name}"
        if isinstance(value, DictConfig):
            flat |= flat_values(value, f"{key}.")
        else:
            flat[key] = "null" if value is None else value
    return flat


@dataclass(frozen=True)
class Key:
    """One configuration key, for help and suggestions."""

    name: str
    type: str
    help: str


def keys_of(section: type[Any], prefix: str = "") -> Iterator[Key]:
    """Every key of a command's schema, in order, with dotted names."""
    hints = get_type_hints(section)
    for key in fields(section):
        hint = hints[key.name]
        if is_dataclass(hint):
            yield from keys_of(cast(type, hint), f"{prefix}{key.name}.")
        else:
            yield Key(f"{prefix}{key.name}", _type_name(hint), key.metadata["help"])


def groups_of(command: str) -> dict[str, list[str]]:
    """The configuration groups of a command and their choices."""
    text = (config_dir() / f"{command}.yaml").read_text()
    named = re.findall(r"^  - (?:optional )?(\w+):", text, flags=re.MULTILINE)
    return {group: choices(group) for group in named}


def _type_name(hint: Any) -> str:
    if get_args(hint) and type(None) in get_args(hint):
        return f"{_type_name(next(part for part in get_args(hint) if part is not type(None)))} or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(hint.__members__)
    return str(hint) if get_args(hint) else hint.__name__


def _check_overrides(command: str, overrides: Sequence[str]) -> None:
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


def _explained(command: str, overrides: Sequence[str], error: Exception) -> ConfigError:
    """Hydra's error in one line: the override it is about, and what that key takes."""
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override!r}: can't be read as key=value")
    cause = error.__cause__ or error
    types = {key.name: key.type for key in keys_of(COMMANDS[command])}
    name = getattr(error, "full_key", None) or getattr(cause, "full_key", None)
    if name not in types:
        return ConfigError(f"{' '.join(overrides)}: {str(cause).strip().splitlines()[0]}")
    given = next((override for override in overrides if override.lstrip("+").startswith(f"{name}=")), name)
    return ConfigError(
        f"{given}: must be {types[name]}{nearest(given.partition('=')[2], types[name].split('|'))}"
    )
