"""Whole commands: their typed configuration, composed from configs/*.yaml and the command line by Hydra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepvit_train.config.alias import current_override
from deepvit_train.config.command import COMMANDS, groups_of
from deepvit_train.config.data import data_set_name
from deepvit_train.config.override import check_overrides, explained, take_texts, with_subject
from deepvit_train.config.photographs import implied_choices
from deepvit_train.config.shipped import config_dir, not_yaml
from deepvit_train.error import ConfigError


def compose_command(command: str, overrides: Sequence[str]) -> Any:
    """The checked configuration of a command, as dataclasses.

    Raises ConfigError naming the key, the value and the nearest valid one. For a path that can't be followed
    it raises the error of what the path is for.
    """
    overrides = with_subject(command, overrides)
    composed = compose_tree(command, overrides)
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(composed))
        if missing:
            raise _missing(command, missing)
        config: Any = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise explained(command, overrides, error) from None
    config.check_typed({override.lstrip("+").partition("=")[0] for override in overrides})
    config.check_paths()
    return config


def compose_tree(command: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration as Hydra composes it, typed but not yet checked. Raises ConfigError."""
    overrides = [current_override(each) for each in with_subject(command, overrides)]
    check_overrides(command, overrides)
    for_hydra, texts = take_texts(command, [*implied_choices(command, overrides), *overrides])
    OmegaConf.register_new_resolver("data_set", data_set_name, replace=True)
    ConfigStore.instance().store(name=f"{command}_schema", node=COMMANDS[command])
    try:
        with _without_caller(), initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            tree = compose(command, overrides=for_hydra)
        for name, value in texts.items():
            OmegaConf.update(tree, name, value, force_add=True)
        OmegaConf.resolve(tree)
        return tree
    except (HydraException, OmegaConfBaseException) as error:
        raise explained(command, overrides, error) from None
    except yaml.YAMLError as error:
        raise not_yaml(error) from None


def _missing(command: str, keys: list[str]) -> ConfigError:
    """What is said of keys without a value. A group misses many where its YAML file lacks the base."""
    group = keys[0].partition(".")[0]
    if group in groups_of(command) and sum(key.startswith(f"{group}.") for key in keys) > 1:
        return ConfigError(
            f"{', '.join(keys)}: not given; the YAML file of {group}= must begin with `defaults: [base]`"
        )
    return ConfigError(f"{keys[0]} is not given: add {keys[0]}=VALUE")


@contextmanager
def _without_caller() -> Iterator[None]:
    """Put aside the Hydra of a program that calls this one: Hydra refuses to begin twice in a process."""
    callers = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = callers


def told_choices(command: str, overrides: Sequence[str]) -> str:
    """A comment line on the choices that nobody typed and that follow from others; '' if there are none."""
    implied = implied_choices(command, with_subject(command, overrides))
    return f"# chosen by the data: {' '.join(implied)}\n" if implied else ""


def as_yaml(tree: Any) -> str:
    """A composed or checked configuration as YAML text."""
    config = tree if isinstance(tree, DictConfig) else OmegaConf.create(plain(tree))
    return OmegaConf.to_yaml(config)


def plain(value: Any) -> Any:
    """A configuration as nested dicts, lists and scalars."""
    if is_dataclass(value):
        return {key.name: plain(getattr(value, key.name)) for key in fields(value)}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else value


def flat_values(tree: DictConfig, prefix: str = "") -> dict[str, Any]:
    """A composed configuration's values by dotted key, without those that must be given."""
    flat: dict[str, Any] = {}
    for name in tree:
        if OmegaConf.is_missing(tree, name):
            continue
        value, key = tree[name], f"{prefix}{name}"
        # In a typed tree a section has a type of its own, and values under free names have none.
        is_value = OmegaConf.get_type(tree) is not dict and OmegaConf.get_type(tree, str(name)) is dict
        if isinstance(value, DictConfig) and is_value:
            flat[key] = OmegaConf.to_container(value)
        elif isinstance(value, DictConfig):
            flat |= flat_values(value, f"{key}.")
        else:
            flat[key] = "null" if value is None else value
    return flat
