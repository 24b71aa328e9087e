"""Read the architectures that `configs/model/*.yaml` describe.

Only these files hold the sizes of the presets. Hydra composes them for the commands. timm's registry and the
import of weights read the same files here, by the same rule, without the time that Hydra takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from deepvit_train.config.alias import current
from deepvit_train.config.model import AttentionConfig, ModelConfig, check_architecture
from deepvit_train.config.option import Section
from deepvit_train.config.shipped import choices, read_yaml
from deepvit_train.error import ConfigError, nearest


@dataclass(frozen=True)
class Architecture:
    """A model that can be built: its shape and its attention."""

    model: ModelConfig
    attn: AttentionConfig

    def __post_init__(self) -> None:
        check_architecture(self.model, self.attn)


def attention_preset(name: str) -> AttentionConfig:
    """Return the attention that `attn=NAME` gives. Raises ConfigError for an unknown name."""
    name = current("attn", name)
    _check_choice("attn", name)
    return section_from(AttentionConfig, _read("attn", name)[0])


def model_preset(name: str) -> Architecture:
    """Return the architecture that `model=NAME` gives. Raises ConfigError for an unknown name."""
    _check_choice("model", name)
    content, chosen = _read("model", name)
    attn = _read("attn", chosen["attn"])[0] | content.get("attn", {})
    return Architecture(section_from(ModelConfig, content["model"]), section_from(AttentionConfig, attn))


def file_limits() -> tuple[int, int]:
    """Return the largest file in bytes, and the largest image in pixels, that runs read unless told else."""
    content, _ = _read("data", "imagefolder")
    return content["max_bytes"], content["max_pixels"]


def section_from(section: type[Any], values: dict[str, Any]) -> Any:
    """Build a section of the schema from YAML or JSON data. Raises ConfigError if the data do not fit it."""
    hints = _hints(section)
    if unknown := sorted(set(values) ^ set(hints)):
        raise ConfigError(f"{section.__name__}: missing or unknown keys: {', '.join(unknown)}")
    return section(
        **{
            name: _converted(f"{section.prefix()}{name}", hints[name], value)
            for name, value in values.items()
        }
    )


def plain_from(section: Section) -> dict[str, Any]:
    """Return a section as plain data: the reverse of section_from."""
    return {
        name: value.value if isinstance(value := getattr(section, name), Enum) else value
        for name in _hints(type(section))
    }


@cache
def _hints(section: type[Any]) -> dict[str, Any]:
    return get_type_hints(section)  # evaluates text anew at each call


def _converted(name: str, hint: Any, value: Any) -> Any:
    """Return the value as the schema holds it. Raises ConfigError for a value of another type.

    The hint is a scalar, an enum or a list of scalars, and each may be optional.
    """
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


def _check_choice(group: str, name: str) -> None:
    if name not in choices(group):
        raise ConfigError(
            f"{group}={name}: unknown{nearest(name, choices(group))} (choices: {', '.join(choices(group))})"
        )


def _read(group: str, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a file of a group, and the choices that it makes for other groups.

    As in Hydra, the files under `defaults:` are read first, and the file itself overrides them.
    """
    own = read_yaml(f"{group}/{name}")
    content: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    for entry in own.pop("defaults", []):
        if isinstance(entry, str):
            below, chosen_below = _read(group, entry)
            content, chosen = _merged(content, below), chosen_below | chosen
        else:
            chosen |= {key.removeprefix("override /"): choice for key, choice in entry.items()}
    return _merged(content, own), chosen


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dictionaries. If both have a key, the value of `above` is taken."""
    both = below | above
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict):
            both[key] = _merged(below[key], above[key])
    return both
