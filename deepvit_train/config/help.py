"""What `--help` prints, written from the schemas and the YAML files."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from textwrap import wrap
from typing import Any

from deepvit_train.config import photographs
from deepvit_train.config.command import (
    COMMANDS,
    Key,
    console_name,
    default_choices,
    groups_of,
    keys_of,
)
from deepvit_train.config.compose import compose_tree, flat_values
from deepvit_train.config.foreign import ForeignKeys

WIDTH = 100
GENERAL = "general"
HEADINGS = {
    "": GENERAL,
    "attn": "attention",
    "augment": "augmentation",
    "optim": "optimizer",
}
FOREIGN = "weights of another project (see docs/weights.md)"


def command_help(command: str) -> str:
    """What a command does, how it is called, and every choice and key that it takes."""
    train = command == "train"
    lines = [
        summary(command),
        "",
        f"usage: {console_name(command)} [--help] [--version] [--cfg] {'[-m] ' * train}KEY=VALUE ...",
        "",
        "  --cfg  print the composed configuration and stop",
    ]
    if train:
        lines.append("  -m     train every combination of values: model.depth=4,8 attn=self,reattention")
        lines.append(
            "  --from-timm 'train.py DIR --model vit_small ...'  print the same as a command of this program"
        )
    values = flat_values(compose_tree(command, []))
    keys = keys_of(COMMANDS[command])
    required = [key for key in keys if key.name not in values]
    lines += _key_lines({"required": required} if required else {}, values)
    lines += _choice_lines(command)
    lines += _key_lines(_by_heading(command, [key for key in keys if key.name in values]), values)
    return "\n".join(lines)


def overview(does: str, program: str, commands: dict[str, str]) -> str:
    """What a program with several commands does, and what each does and takes, by the word that is typed."""
    wide = max(map(len, commands))
    indent = " " * (wide + 4)
    lines = [does, "", f"usage: {program} COMMAND [--help] KEY=VALUE ...", "", "commands:"]
    for word, command in commands.items():
        lines.append(f"  {word:{wide}}  {summary(command)}")
        lines += _wrapped(_short_keys(command), indent, indent)
    return "\n".join([*lines, "", f"{program} COMMAND --help says what each key means."])


def _short_keys(command: str) -> str:
    """The keys and groups of a command in a line; of a section with many keys, its name: `data.*`."""
    keys = [key.name for key in keys_of(COMMANDS[command])]
    names = [f"{name.partition('.')[0]}.*" if "." in name else name for name in keys]
    groups = [f"{group}=" for group in groups_of(command)]
    return f"keys: {', '.join(dict.fromkeys([*names, *groups]))}"


def summary(command: str) -> str:
    """One sentence: what a command does."""
    return (inspect.getdoc(COMMANDS[command]) or "").splitlines()[0]


def _by_heading(command: str, keys: list[Key]) -> dict[str, list[Key]]:
    """The keys under the heading of their section. The command's own stand first, a foreign file's last."""
    foreign = (
        {key.name for key in fields(ForeignKeys)} if issubclass(COMMANDS[command], ForeignKeys) else set()
    )
    headed: dict[str, list[Key]] = {GENERAL: []}
    for key in keys:
        section = key.name.rpartition(".")[0]
        if key.name not in foreign:
            headed.setdefault(HEADINGS.get(section, section), []).append(key)
    headed[FOREIGN] = [key for key in keys if key.name in foreign]
    return {heading: group for heading, group in headed.items() if group}


def _key_lines(headed: dict[str, list[Key]], values: dict[str, Any]) -> list[str]:
    lines = []
    for heading, keys in headed.items():
        lines += ["", f"{heading}:"]
        for key in keys:
            default = f" [{_typed(values[key.name])}]" if key.name in values else ""
            lines += _wrapped(f"{key.name} ({key.type}){default}", "  ")
            lines += _wrapped(key.help, "      ", "      ")
    return lines


def _choice_lines(command: str) -> list[str]:
    groups, defaults = groups_of(command), default_choices(command)
    if not groups:
        return []
    lines = ["", "choices by name [default]:"]
    for group, names in groups.items():
        default = defaults[group] or "null"
        if default.startswith("${"):  # augment is chosen like data
            default = f"as {default[2:-1]}"
        lines += _wrapped(f"{group}={' | '.join(names)} [{default}]", "  ")
    if command == "train":
        lines += _wrapped(photographs.HELP, "  ", "  ")
    return lines


def _wrapped(text: str, indent: str, following: str = "      ") -> list[str]:
    return wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=following,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_typed, value))}]"
    return str(value)
