"""The console commands: compose the configuration, run, and turn errors into exit codes.

deepvit-train KEY=VALUE ...          python -m deepvit_train.cli train KEY=VALUE ...
deepvit-eval checkpoint=PATH ...     python -m deepvit_train.cli eval checkpoint=PATH ...
deepvit-convert source=FILE out=FOLDER   python -m deepvit_train.cli convert source=FILE out=FOLDER
deepvit-bench KEY=VALUE ...          python -m deepvit_train.cli bench KEY=VALUE ...
deepvit-data check root=FOLDER       python -m deepvit_train.cli data check root=FOLDER
deepvit-analyze checkpoint=PATH ...  python -m deepvit_train.cli analyze checkpoint=PATH ...
deepvit-study root=FOLDER ...        python -m deepvit_train.cli study root=FOLDER ...
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from deepvit_train import __version__
from deepvit_train.commands import sweep
from deepvit_train.config.compose import (
    COMMANDS,
    as_yaml,
    compose_command,
    compose_tree,
    console_name,
    flat_values,
    groups_of,
    keys_of,
)
from deepvit_train.error import ConfigError, UserError, explain, nearest

# The module of each command; imported only once the configuration is valid, because torch takes seconds.
MODULES = {
    "train": "deepvit_train.commands.train",
    "eval": "deepvit_train.commands.evaluate",
    "convert": "deepvit_train.commands.convert",
    "bench": "deepvit_train.commands.bench",
    "data-check": "deepvit_train.commands.data_check",
    "analyze": "deepvit_train.commands.analyze",
    "study": "deepvit_train.commands.study",
    "data-demo": "deepvit_train.commands.data_folder",
    "data-fashion-mnist": "deepvit_train.commands.data_folder",
}


def train() -> NoReturn:
    """Entry point of deepvit-train."""
    main(["train", *sys.argv[1:]])


def evaluate() -> NoReturn:
    """Entry point of deepvit-eval."""
    main(["eval", *sys.argv[1:]])


def convert() -> NoReturn:
    """Entry point of deepvit-convert."""
    main(["convert", *sys.argv[1:]])


def bench() -> NoReturn:
    """Entry point of deepvit-bench."""
    main(["bench", *sys.argv[1:]])


def analyze() -> NoReturn:
    """Entry point of deepvit-analyze."""
    main(["analyze", *sys.argv[1:]])


def study() -> NoReturn:
    """Entry point of deepvit-study."""
    main(["study", *sys.argv[1:]])


def data() -> NoReturn:
    """Entry point of deepvit-data."""
    main(["data", *sys.argv[1:]])


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run `COMMAND [--help | --version | --cfg | -m] KEY=VALUE ...` and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        sys.exit(_dispatch(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["data"]:
        # deepvit-data's first word names one of its commands.
        arguments = _data_command(arguments[1:])
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(f"usage: python -m deepvit_train.cli {{{'|'.join(COMMANDS)}}} [--help] KEY=VALUE ...")
        return 0
    if command not in COMMANDS:
        raise ConfigError(
            f"{command}: no such command{nearest(command, COMMANDS)} (choices: {', '.join(COMMANDS)})"
        )
    flags = [argument for argument in arguments[1:] if argument.startswith("-")]
    overrides = [argument for argument in arguments[1:] if not argument.startswith("-")]
    known = ["-h", "--help", "--version", "--cfg"] + (["-m", "--multirun"] if command == "train" else [])
    if unknown := [flag for flag in flags if flag not in known]:
        raise ConfigError(
            f"{unknown[0]}: no such option{nearest(unknown[0], known)} (options: {', '.join(known)})"
        )
    if {"-h", "--help"} & set(flags):
        _print_help(command)
    elif "--version" in flags:
        print(f"deepvit-train {__version__} from {Path(__file__).parent}")
    elif "--cfg" in flags:
        print(as_yaml(compose_tree(command, overrides)), end="")
    elif {"-m", "--multirun"} & set(flags):
        return sweep.run(overrides, partial(run_command, "train"))
    else:
        run_command(command, compose_command(command, overrides))
    return 0


def _data_command(arguments: list[str]) -> list[str]:
    known = [name.removeprefix("data-") for name in COMMANDS if name.startswith("data-")]
    word = arguments[0] if arguments else "--help"
    if word in ("-h", "--help"):
        print(f"usage: deepvit-data {{{'|'.join(known)}}} [--help] KEY=VALUE ...")
        sys.exit(0)
    if word not in known:
        raise ConfigError(
            f"deepvit-data {word}: no such command{nearest(word, known)} (choices: {', '.join(known)})"
        )
    return [f"data-{word}", *arguments[1:]]


def run_command(command: str, config: Any) -> Any:
    """Run a command on its checked configuration. Raises UserError for all that a user can mend."""
    module = importlib.import_module(MODULES[command])
    try:
        return module.run(config)
    except UserError:
        raise
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        raise explained from None


def _print_help(command: str) -> None:
    print(
        f"usage: {console_name(command)} [--help] [--version] [--cfg] "
        f"{'[-m] ' if command == 'train' else ''}KEY=VALUE ...\n"
    )
    print("--cfg prints the composed configuration and stops.")
    if command == "train":
        print("-m trains every combination of comma-separated values: model.depth=4,8 attn=self,reattention")
    if groups := groups_of(command):
        print("\nchosen by name:")
        for group, names in groups.items():
            print(f"  {group}={'|'.join(names)}")
    print("\nchosen by value [default]:")
    values = flat_values(compose_tree(command, []))
    for key in keys_of(COMMANDS[command]):
        print(f"  {key.name} ({key.type}) [{values.get(key.name, 'required')}]\n      {key.help}")


if __name__ == "__main__":
    main()
