"""Read a command line of timm's train.py, or of DeiT's main.py, by the tables of flags in configs/timm/."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from deepvit_train.config.shipped import config_dir
from deepvit_train.error import ConfigError, nearest

# timm's keywords of a model, and the keys of `model` that they stand for.
KEYWORDS = {
    "img_size": "image_size",
    "embed_dim": "dim",
    "num_heads": "heads",
    "reg_tokens": "registers",
    "init_values": "layer_scale",
    "drop_path_rate": "drop_path",
    "proj_drop_rate": "dropout",
    "pos_drop_rate": "emb_dropout",
}
# Other scripts of timm, and what does here what they do.
OTHER_SCRIPTS = {
    "validate.py": "deepvit-eval checkpoint=FILE data.root=DIR",
    "inference.py": "deepvit-predict checkpoint=FILE images=DIR",
    "benchmark.py": "deepvit-bench",
    "onnx_export.py": "deepvit-export checkpoint=FILE out=FOLDER",
}
DEIT_SCRIPTS = ("main.py", "run_with_submitit.py")


class Timm(Protocol):
    """What timm knows, and these tables do not."""

    def model_keys(self, name: str) -> dict[str, Any]:
        """Return the keys of `model` for a model. Raises ConfigError where it can't be trained here."""
        ...

    def optimizers(self) -> list[str]:
        """Return the names of timm's optimizers."""
        ...


@dataclass(frozen=True)
class Flag:
    """A flag of another program, as a line of configs/timm/*.txt describes it."""

    names: tuple[str, ...]
    values: str  # 0, 1, ? or +
    default: str
    here: str  # a key; `~ KEYS` that are worked out; `-`: nothing is needed; `!`: missing
    note: str


@cache
def table(program: str) -> dict[str, Flag]:
    """Return the flags of 'train' (timm) or of 'deit' by their first name."""
    lines = (config_dir() / "timm" / f"{program}.txt").read_text().splitlines()
    rows = ([cell.strip() for cell in line.split("|")] for line in lines if not line.startswith("#"))
    return {names.split()[0]: Flag(tuple(names.split()), *rest) for names, *rest in rows}


def is_flag_of_timm(word: str) -> bool:
    """Return whether train.py of timm, or DeiT's main.py, has a flag: --model, or --model=NAME."""
    flags = [*table("train").values(), *table("deit").values()]
    return word.partition("=")[0] in {name for flag in flags for name in flag.names}


@dataclass
class Command:
    """A command line that was read: its flags, and on how many processes it runs."""

    flags: dict[str, Flag]
    deit: bool
    processes: int = 1  # on each machine
    machines: int = 1
    typed: dict[str, list[str]] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # the translation
    notes: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)  # keys to print, whatever their value
    timm: Callable[[], Timm] = field(kw_only=True)

    def words(self, name: str) -> list[str]:
        """Return the values of a flag, by its first name: what was typed, or the default."""
        return self.typed.get(name, self.flags[name].default.split() if name in self.flags else [])

    def text(self, name: str) -> str:
        """Return the last value of a flag, '' without any."""
        return self.words(name)[-1] if self.words(name) else ""

    def number(self, name: str) -> float:
        """Return the value of a flag. Raises ConfigError where it is no number."""
        try:
            return float(self.text(name) or 0)
        except ValueError:
            raise ConfigError(f"{name} {self.text(name)}: not a number") from None

    def has(self, *names: str) -> bool:
        """Return whether any of these flags was typed."""
        return any(name in self.typed for name in names)

    def missing(self, what: str, near: str) -> None:
        """Note what has no counterpart here, and the nearest there is."""
        self.notes.append(f"missing: {what}; nearest: {near}")


def read_command(arguments: Sequence[str], timm: Callable[[], Timm]) -> Command:
    """Read a command line: the launcher, the script, and its flags.

    Args:
        arguments: as one text or in words.
        timm: gives what timm knows; called only where it is needed, because it takes seconds.

    Raises ConfigError for what can't be read.
    """
    words = _words(arguments)
    scripts = [place for place, word in enumerate(words) if word.endswith((".py", ".sh"))]
    start = scripts[0] + 1 if scripts else 0
    launcher, script, rest = words[:start], Path(words[start - 1]).name if scripts else "", words[start:]
    deit = script in DEIT_SCRIPTS or any(word.startswith("--data-path") for word in rest)
    command = Command(table("train") | table("deit") if deit else table("train"), deit, timm=timm)
    if script in OTHER_SCRIPTS:
        raise ConfigError(
            f"{script}: --from-timm translates lines of train.py, and of DeiT's main.py\n"
            f"nearest: {_other_command(script, rest)}"
        )
    spoken = " ".join(launcher)
    command.processes = _count(r"(?:--nproc[-_]per[-_]node|-np|-n)[= ](\d+)", spoken)
    command.machines = _count(r"--nnodes[= ](\d+)", spoken)
    if script.endswith(".sh") and rest and rest[0].isdigit():
        command.processes = int(rest.pop(0))
    _read_flags(command, rest)
    if script == "run_with_submitit.py":
        command.processes = int(command.number("--gpu") or command.number("--ngpus"))
        command.machines = int(command.number("--nodes"))
    return command


def _other_command(script: str, words: list[str]) -> str:
    """Return what does here what another script of timm does, with the paths and the model that are typed."""
    flags = dict(pairwise(part for word in words for part in word.split("=", 1)))
    text = OTHER_SCRIPTS[script].replace("FILE", flags.get("--checkpoint", "FILE"))
    text = text.replace("DIR", words[0] if words and not _is_flag(words[0]) else "DIR")
    model = flags.get("--model") or flags.get("-m")
    return f"{text} preset=timm:{model}" if model and "checkpoint" in text else text


def _count(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 1


def _words(arguments: Sequence[str]) -> list[str]:
    """Split a command line as a shell does, up to where its output is sent."""
    if len(arguments) > 1 and " " in arguments[0].strip():
        raise ConfigError(
            f"{arguments[1]}: --from-timm takes one command line; add it to the printed command"
        )
    text = arguments[0] if len(arguments) == 1 else shlex.join(arguments)
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ConfigError(f"--from-timm: can't be read as a command line ({error})") from None
    if not words:
        raise ConfigError(
            "--from-timm: give a command line: --from-timm 'train.py DIR --model vit_small ...'"
        )
    end = next((n for n, word in enumerate(words) if re.match(r"[\d&]?>|[|;&]", word)), len(words))
    for word in words[:end]:
        if "$" in word:
            raise ConfigError(f"{word}: a variable of the shell; write its value")
    return [word for word in words[:end] if word.strip()]


def _read_flags(command: Command, words: list[str]) -> None:
    while words:
        word, equals, value = words.pop(0).partition("=")
        if not _is_flag(word):
            if command.typed.setdefault("data", [word + equals + value]) != [word + equals + value]:
                command.notes.append(f"unknown: {word}: a second word without a flag before it")
            continue
        flag, given = _flag(command, word), [value] if equals else []
        many = {"0": 0, "1": 1, "?": 1, "+": len(words)}[flag.values if flag else "+"]
        while words and len(given) < many and not _is_flag(words[0]):
            given.append(words.pop(0))
        if flag is None:
            known = [name for each in command.flags.values() for name in each.names]
            command.notes.append(
                f"unknown: {shlex.join([word, *given])}: no flag of timm{nearest(word, known)}"
            )
        elif flag.values in "1+" and not given:
            raise ConfigError(f"{word}: needs a value")
        else:
            command.typed[flag.names[0]] = given


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _flag(command: Command, word: str) -> Flag | None:
    """Return the flag of a name, of the same name with other dashes, or of the only name it begins."""
    names = {name: flag for flag in command.flags.values() for name in flag.names}
    same = [flag for name, flag in names.items() if name.replace("_", "-") == word.replace("_", "-")]
    begun = {flag.names[0]: flag for name, flag in names.items() if len(word) > 3 and name.startswith(word)}
    found = [names[word]] if word in names else same or list(begun.values())
    return found[0] if len(found) == 1 else None
