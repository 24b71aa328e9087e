"""`deepvit-train -m` trains every combination of comma-separated values, one after the other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.table import Table

from deepvit_train.config.compose import compose_command
from deepvit_train.config.override import take_texts
from deepvit_train.config.train import TrainConfig
from deepvit_train.console import console, tell_error
from deepvit_train.distributed.launch import read_launch
from deepvit_train.error import ConfigError, Interrupted, UserError

# Keys whose values the default name of a run already contains.
IN_NAME = {"model.depth", "attn", "data", "seed"}


def run(overrides: Sequence[str], train: Callable[[TrainConfig], dict[str, Any]]) -> None:
    """Train every combination. All are checked before the first starts, and a failed one stops no other.

    Where torchrun started several ranks, each rank comes here. A run that fails on one of them ends on the
    others too, because the ranks lose each other, and they meet again in the next run.

    Raises ConfigError for two runs in one folder. At the end raises a UserError with the exit code of the
    first run that failed.
    """
    jobs = [(job, _compose(job)) for job in expand(overrides)]
    _check_folders([config.run_dir for _, config in jobs])
    launch = read_launch()
    say = console.print if launch.rank == 0 else _say_nothing
    outcomes: list[tuple[str, str, dict[str, Any]]] = []
    failures: list[tuple[str, UserError]] = []
    for number, (job, config) in enumerate(jobs, start=1):
        say(f"run {number} of {len(jobs)}: {' '.join(job)}")
        try:
            outcomes.append((config.name, "done", train(config)))
        except Interrupted:
            raise
        except UserError as error:
            tell_error(error)
            failures.append((config.name, error))
            outcomes.append((config.name, f"failed (exit code {error.exit_code})", {}))
    say(_table(outcomes))
    if launch.size > 1:
        _wait_for_the_others(jobs[-1][1].trainer.timeout_s)
    if failures:
        name, first = failures[0]
        failed = UserError(
            f"{len(failures)} of {len(jobs)} runs failed; the first is {name}: {str(first).splitlines()[0]}"
        )
        failed.exit_code = first.exit_code
        raise failed


def _wait_for_the_others(timeout_s: float) -> None:
    """Meet the other ranks once more: torchrun ends all ranks when the first of them ends with an error."""
    from deepvit_train.distributed import world  # imports torch, which a mistake in a key need not wait for

    with suppress(UserError):
        world.start("cpu", timeout_s).barrier()
        world.stop()


def _say_nothing(_: object) -> None:
    """Ignore what is said: only the first rank prints."""


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each run, as Hydra's basic sweeper combines them. Each run has its own name."""
    for_hydra, texts = take_texts("train", overrides, sweeps=True)
    parsed = OverridesParser.create().parse_overrides(for_hydra)
    swept = [override.key_or_group for override in parsed if override.is_sweep_override()]
    jobs = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
    jobs = [[*job, *(f"{name}={text}" for name, text in texts.items())] for job in jobs]
    names = [_compose(job).name for job in jobs]
    if max(Counter(names).values()) == 1:
        return jobs
    telling = [key for key in swept if key not in IN_NAME]
    named = [f"{name}{_suffix(job, telling)}" for job, name in zip(jobs, names, strict=True)]
    # Two values can give the same part of a name, once characters are replaced: then a number is added.
    seen = Counter(named)
    named = [name if seen[name] == 1 else f"{name}-{number}" for number, name in enumerate(named, start=1)]
    return [[*job, f"name={name}"] for job, name in zip(jobs, named, strict=True)]


def _check_folders(run_dirs: list[str]) -> None:
    folders = Counter(Path(run_dir).expanduser().absolute() for run_dir in run_dirs)
    folder, runs = folders.most_common(1)[0]
    if runs > 1:
        raise ConfigError(
            f"run_dir={run_dirs[0]}: {runs} of the {len(run_dirs)} runs would be written to {folder}\n"
            "leave run_dir out, or give it a part that differs: run_dir='runs/${name}'"
        )


def _compose(job: Sequence[str]) -> TrainConfig:
    return compose_command("train", job)


def _suffix(job: Sequence[str], keys: Sequence[str]) -> str:
    values = dict(override.split("=", 1) for override in job)
    told = (f"-{key.rsplit('.', 1)[-1]}{values[key]}" for key in keys)
    return re.sub(r"[^\w.-]+", "_", "".join(told), flags=re.ASCII)


def _table(outcomes: list[tuple[str, str, dict[str, Any]]]) -> Table:
    metrics = sorted({name for _, _, result in outcomes for name in result if "/" in name})
    table = Table("run", "outcome", *metrics, title="all runs")
    for name, outcome, result in outcomes:
        table.add_row(
            name, outcome, *[f"{result[metric]:.4f}" if metric in result else "" for metric in metrics]
        )
    return table
