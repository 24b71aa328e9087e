"""`deepvit-train -m` trains every combination of comma-separated values, one after the other."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from rich.table import Table

from deepvit_train.config.compose import compose_command
from deepvit_train.config.override import take_texts
from deepvit_train.config.train import TrainConfig
from deepvit_train.console import console
from deepvit_train.error import Interrupted, UserError

# Keys whose values the default name of a run already contains.
IN_NAME = {"model.depth", "attn", "data", "seed"}


def run(overrides: Sequence[str], train: Callable[[TrainConfig], dict[str, Any]]) -> int:
    """Train every combination of values. All are checked before the first one starts.

    A run that fails does not stop the others. Returns the exit code: 0, or that of the first failed run.
    Raises ConfigError for a combination that is not valid, Interrupted for a stop signal.
    """
    jobs = [(job, _compose(job)) for job in expand(overrides)]
    outcomes: list[tuple[str, str, dict[str, Any]]] = []
    exit_code = 0
    for number, (job, config) in enumerate(jobs, start=1):
        console.print(f"run {number} of {len(jobs)}: {' '.join(job)}")
        try:
            result = train(config)
            outcomes.append((config.name, "done", result))
        except Interrupted:
            raise
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            exit_code = exit_code or error.exit_code
            outcomes.append((config.name, f"failed (exit code {error.exit_code})", {}))
    console.print(_table(outcomes))
    return exit_code


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
