"""The console commands: compose the configuration, run, and turn errors into exit codes.

deepvit-train KEY=VALUE ...          python -m deepvit_train.cli train KEY=VALUE ...
deepvit-eval checkpoint=PATH ...     python -m deepvit_train.cli eval checkpoint=PATH ...
deepvit-compare RUN RUN ...          python -m deepvit_train.cli compare RUN RUN ...
deepvit-predict checkpoint=PATH images=PATH   python -m deepvit_train.cli predict checkpoint=PATH images=PATH
deepvit-convert source=FILE out=FOLDER   python -m deepvit_train.cli convert source=FILE out=FOLDER
deepvit-export checkpoint=PATH out=FOLDER    python -m deepvit_train.cli export checkpoint=PATH out=FOLDER
deepvit-bench KEY=VALUE ...          python -m deepvit_train.cli bench KEY=VALUE ...
deepvit-data check root=FOLDER       python -m deepvit_train.cli data check root=FOLDER
deepvit-analyze checkpoint=PATH ...  python -m deepvit_train.cli analyze checkpoint=PATH ...
deepvit-study root=FOLDER ...        python -m deepvit_train.cli study root=FOLDER ...
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from deepvit_train import __version__
from deepvit_train.commands import sweep
from deepvit_train.config.command import COMMANDS
from deepvit_train.config.compose import as_yaml, compose_command, compose_tree, told_choices
from deepvit_train.config.help import command_help, overview
from deepvit_train.console import lost_output, protect_streams, tell_error
from deepvit_train.error import ConfigError, OutputError, UserError, explained, nearest

# The module of each command; imported only once the configuration is valid, because torch takes seconds.
MODULES = {
    "train": "deepvit_train.commands.train",
    "eval": "deepvit_train.commands.evaluate",
    "compare": "deepvit_train.commands.compare",
    "predict": "deepvit_train.commands.predict",
    "convert": "deepvit_train.commands.convert",
    "export": "deepvit_train.commands.export",
    "bench": "deepvit_train.commands.bench",
    "data-check": "deepvit_train.commands.data_check",
    "analyze": "deepvit_train.commands.analyze",
    "study": "deepvit_train.commands.study",
    "data-demo": "deepvit_train.commands.data_folder",
    "data-fashion-mnist": "deepvit_train.commands.data_folder",
}
# Options with which a command only prints.
PRINTING = ("-h", "--help", "--version", "--cfg")
SWEEPING = {"-m", "--multirun"}


def train() -> NoReturn:
    """Entry point of deepvit-train."""
    main(["train", *sys.argv[1:]])


def evaluate() -> NoReturn:
    """Entry point of deepvit-eval."""
    main(["eval", *sys.argv[1:]])


def compare() -> NoReturn:
    """Entry point of deepvit-compare."""
    main(["compare", *sys.argv[1:]])


def predict() -> NoReturn:
    """Entry point of deepvit-predict."""
    main(["predict", *sys.argv[1:]])


def convert() -> NoReturn:
    """Entry point of deepvit-convert."""
    main(["convert", *sys.argv[1:]])


def export() -> NoReturn:
    """Entry point of deepvit-export."""
    main(["export", *sys.argv[1:]])


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
    protect_streams()
    # torch prints a page of C++ frames with some warnings, such as that of a lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHON_COLORS", "0")  # newer versions of Python colour tracebacks
    try:
        _check_folder()
        code = _recorded(arguments)
        _check_output(arguments)
        sys.exit(code)
    except UserError as error:
        tell_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _check_folder() -> None:
    try:
        Path.cwd()
    except OSError:
        raise OutputError("the working folder was removed; change to one that exists") from None


def _check_output(arguments: list[str]) -> None:
    """Raise OutputError if what a command printed was lost to a full disk.

    A reader who left is no error. Nor is a lost line of a training, whose results lie in its folder.
    """
    runs = arguments[:1] in (["train"], ["study"]) and not set(PRINTING) & set(arguments)
    if not runs and (error := lost_output()) is not None:
        raise OutputError(f"stdout: can't be written ({getattr(error, 'strerror', None) or error})")


def _recorded(arguments: list[str]) -> int:
    """Dispatch, and under torchrun leave the error where torchrun looks for the cause of a failure."""
    if not os.environ.get("TORCHELASTIC_ERROR_FILE"):
        return _dispatch(arguments)
    from torch.distributed.elastic.multiprocessing.errors import record

    def told() -> int:
        try:
            return _dispatch(arguments)
        except UserError as error:
            # Without the frames that it came through: torchrun prints them all, and the line says enough.
            raise error.with_traceback(None) from None

    return record(told)() or 0


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["data"]:
        # deepvit-data's first word names one of its commands.
        arguments = _data_command(arguments[1:])
        if not arguments:
            return 0
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        commands = {name: name for name in COMMANDS}
        print(overview("Train, evaluate and explain DeepViT.", "python -m deepvit_train.cli", commands))
        return 0
    if command not in COMMANDS:
        raise ConfigError(
            f"{command}: no such command{nearest(command, COMMANDS)} (choices: {', '.join(COMMANDS)})"
        )
    if command == "train" and "--from-timm" in arguments:
        from deepvit_train.config.from_timm import from_timm  # other starts need none of its tables

        print(from_timm(arguments[arguments.index("--from-timm") + 1 :], _timm))
        return 0
    flags = [argument for argument in arguments[1:] if argument.startswith("-")]
    overrides = [argument for argument in arguments[1:] if not argument.startswith("-")]
    known = [*PRINTING, *(["-m", "--multirun", "--from-timm"] if command == "train" else [])]
    if unknown := [flag for flag in flags if flag not in known]:
        from deepvit_train.config.timm_command import is_flag_of_timm

        if command == "train" and is_flag_of_timm(unknown[0]):
            raise ConfigError(
                f"{unknown[0]}: an option of timm's train.py; keys are typed as model=vit_small\n"
                "did you mean --from-timm? deepvit-train --from-timm 'train.py DIR --model ...' translates"
            )
        raise ConfigError(
            f"{unknown[0]}: no such option{nearest(unknown[0], known)} (options: {', '.join(known)})"
        )
    if {"-h", "--help"} & set(flags):
        print(command_help(command))
    elif "--version" in flags:
        print(f"deepvit-train {__version__} from {Path(__file__).parent}")
    elif "--cfg" in flags:
        print(_told_configuration(command, overrides, bool(SWEEPING & set(flags))), end="")
    elif SWEEPING & set(flags):
        sweep.run(overrides, partial(run_command, "train"))
    else:
        run_command(command, compose_command(command, overrides))
    return 0


def _timm() -> Any:
    """Import what asks timm, which takes seconds."""
    return importlib.import_module("deepvit_train.commands.train_timm")


def _told_configuration(command: str, overrides: list[str], sweeps: bool) -> str:
    """The configuration as YAML: that of one run, or of each run of a sweep as a document of its own."""
    if not sweeps:
        return told_choices(command, overrides) + as_yaml(compose_tree(command, overrides))
    jobs = sweep.expand(overrides)
    told = [
        f"--- # run {number} of {len(jobs)}: {' '.join(job)}\n{_told_configuration(command, job, False)}"
        for number, job in enumerate(jobs, start=1)
    ]
    return "".join(told)


def _data_command(arguments: list[str]) -> list[str]:
    """Return the arguments of the command that deepvit-data's first word names, or nothing after its help."""
    commands = {name.removeprefix("data-"): name for name in COMMANDS if name.startswith("data-")}
    word = arguments[0] if arguments else "--help"
    if word in ("-h", "--help"):
        print(overview("Check a data set, or write one as a folder of images.", "deepvit-data", commands))
        return []
    if word not in commands:
        raise ConfigError(
            f"deepvit-data {word}: no such command{nearest(word, commands)} (choices: {', '.join(commands)})"
        )
    return [commands[word], *arguments[1:]]


def run_command(command: str, config: Any) -> Any:
    """Run a command on its checked configuration. Raises UserError for all that a user can mend."""
    module = importlib.import_module(MODULES[command])
    with explained(command):
        return module.run(config)


if __name__ == "__main__":
    main()
