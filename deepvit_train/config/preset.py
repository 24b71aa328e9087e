"""The shipped YAML files: where they are, and the architectures that `configs/model/*.yaml` describe.

The files are the one owner of the presets' shapes: Hydra composes them for the commands, and Python code
(timm's registry, weight import) reads the same files here.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from deepvit_train.config.alias import current
from deepvit_train.config.model import AttentionConfig, ModelConfig, check_architecture
from deepvit_train.config.option import Section
from deepvit_train.error import ConfigError, nearest


@dataclass(frozen=True)
class Architecture:
    """A model that can be built: its shape and its attention."""

    model: ModelConfig
    attn: AttentionConfig

    def __post_init__(self) -> None:
        check_architecture(self.model, self.attn)


def config_dir() -> Path:
    """The folder of YAML files: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"configs/ is neither inside nor beside {package}: reinstall deepvit-train")


def choices(group: str) -> list[str]:
    """The names one can give for a configuration group, sorted: choices('attn')."""
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))


def attention_preset(name: str) -> AttentionConfig:
    """The attention that `attn=NAME` gives. Raises ConfigError for an unknown name."""
    return section_from(AttentionConfig, _read("attn", current("attn", name)))


def model_preset(name: str) -> Architecture:
    """The architecture that `model=NAME` gives. Raises ConfigError for an unknown name."""
    content = _read("model", name)
    attention = next(entry["override /attn"] for entry in content["defaults"] if "override /attn" in entry)
    attn = _read("attn", attention) | content.get("attn", {})
    return Architecture(section_from(ModelConfig, content["model"]), section_from(AttentionConfig, attn))


def section_from(section: type[Any], values: dict[str, Any]) -> Any:
    """A section of the schema from plain data (YAML or JSON). Raises ConfigError where that doesn't fit."""
    hints = get_type_hints(section)
    if unknown := sorted(set(values) ^ set(hints)):
        raise ConfigError(f"{section.__name__}: missing or unknown keys: {', '.join(unknown)}")
    return section(
        **{
            name: _converted(f"{section.prefix()}{name}", hints[name], value)
            for name, value in values.items()
        }
    )


def plain_from(section: Section) -> dict[str, Any]:
    """The reverse of section_from: a section as plain data."""
    return {
        name: value.value if isinstance(value := getattr(section, name), Enum) else value
        for name in get_type_hints(type(section))
    }


def _converted(name: str, hint: Any, value: Any) -> Any:
    """The value as the schema holds it; the hint is a scalar, enum or list of scalars, maybe optional."""
    value = current(name, value)
    if type(None) in get_args(hint):
        if value is None:
            return None
        (hint,) = (choice for choice in get_args(hint) if choice is not type(None))
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ConfigError(f"{name}={value!r}: not a list")
        return [_converted(name, get_args(hint)[0], entry) for entry in value]
    if issubclass(hint, Enum):
        return hint(value)
    numeric = hint in (int, float)
    if not isinstance(value, (int, float) if hint is float else hint) or (
        numeric and isinstance(value, bool)
    ):
        raise ConfigError(f"{name}={value!r}: not a value of type {hint.__name__}")
    return value


def _read(group: str, name: str) -> dict[str, Any]:
    if name not in choices(group):
        raise ConfigError(
            f"{group}={name}: unknown{nearest(name, choices(group))} (choices: {', '.join(choices(group))})"
        )
    return yaml.safe_load((config_dir() / group / f"{name}.yaml").read_text())
