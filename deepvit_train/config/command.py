"""The commands, their keys, and their groups of choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, cast, get_args, get_origin, get_type_hints

from deepvit_train.config.analyze import AnalyzeConfig
from deepvit_train.config.bench import BenchConfig
from deepvit_train.config.compare import CompareConfig
from deepvit_train.config.convert import ConvertConfig
from deepvit_train.config.data_check import DataCheckConfig
from deepvit_train.config.data_folder import DataDemoConfig, DataFashionMnistConfig
from deepvit_train.config.evaluate import EvalConfig
from deepvit_train.config.export import ExportConfig
from deepvit_train.config.option import Section
from deepvit_train.config.predict import PredictConfig
from deepvit_train.config.shipped import choices, read_yaml
from deepvit_train.config.study import StudyConfig
from deepvit_train.config.train import TrainConfig

# The first line of a schema's docstring is what the command does, and the first line of its --help.
COMMANDS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "compare": CompareConfig,
    "predict": PredictConfig,
    "convert": ConvertConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "data-check": DataCheckConfig,
    "analyze": AnalyzeConfig,
    "study": StudyConfig,
    "data-demo": DataDemoConfig,
    "data-fashion-mnist": DataFashionMnistConfig,
}

# The type, in the help, of keys that take values under names that no file of configs/ need have.
NAMED = "{name: value, ...}"
LIST = "list of "  # what the type of a list begins with, before that of its values


def console_name(command: str) -> str:
    """A command as it is typed: `deepvit-data demo` for data-demo."""
    return f"deepvit-{command.replace('-', ' ', 1)}"


@dataclass(frozen=True)
class Key:
    """One configuration key, for help and suggestions."""

    name: str
    type: str
    help: str


@cache
def keys_of(section: type[Any]) -> tuple[Key, ...]:
    """Every key of a command's schema, in order, with dotted names."""
    return tuple(_keys(section))


def _keys(section: type[Any], prefix: str = "") -> Iterator[Key]:
    hints = get_type_hints(section)
    for key in fields(section):
        hint = hints[key.name]
        if is_dataclass(hint):
            yield from _keys(cast(type, hint), f"{prefix}{key.name}.")
        else:
            yield Key(f"{prefix}{key.name}", _type_name(hint), key.metadata["help"])


def default_choices(command: str) -> dict[str, str | None]:
    """The configuration groups of a command, and the choice of each that its file makes."""
    content = read_yaml(command)
    groups = [entry for entry in content["defaults"] if isinstance(entry, dict)]
    return {group: choice for entry in groups for group, choice in entry.items()}


def groups_of(command: str) -> dict[str, list[str]]:
    """The configuration groups of a command and the names that each takes."""
    return {group: choices(group) for group in default_choices(command)}


def _type_name(hint: Any) -> str:
    if get_args(hint) and type(None) in get_args(hint):
        return f"{_type_name(next(part for part in get_args(hint) if part is not type(None)))} or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "|".join(hint.__members__)
    if get_origin(hint) is dict:
        return NAMED
    if get_origin(hint) is list:
        return f"{LIST}{_type_name(get_args(hint)[0])}"
    return str(hint) if get_args(hint) else hint.__name__
