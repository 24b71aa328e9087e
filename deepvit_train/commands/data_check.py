"""`deepvit-data check` tells what is wrong with a data set, what it holds, and where a step's time goes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from rich.table import Table

from deepvit_train.commands.data_check_timing import tell_timing, time_parts
from deepvit_train.config.data_check import DataCheckConfig
from deepvit_train.console import amount, console, print_report, progress_bar
from deepvit_train.data import check
from deepvit_train.data.channel import channel_statistics
from deepvit_train.data.index import data_root
from deepvit_train.data.loaders import limits, worker_count
from deepvit_train.distributed import world as distributed
from deepvit_train.error import DataError

SHOWN = 20  # errors and warnings in the tables; the JSON has all
CHANNEL_IMAGES = 1000  # of which mean and standard deviation are measured
ROWS = ["images", "bad", "classes", "images_a_class", "kinds", "left_out", "width", "height", "bytes", "gib"]


def run(config: DataCheckConfig) -> dict[str, Any]:
    """Check a data set. Prints tables, and a JSON object as the last line.

    Raises DataError where there is an error in it; damaged files that can be read are warnings.
    """
    root = data_root(config.data)
    if config.threads:
        torch.set_num_threads(config.threads)
    world = distributed.start(config.device.value, timeout_s=60)

    # List the folders, then read every file.
    names = dict.fromkeys(("train", config.data.evaluated))  # data.split=train names it twice
    splits = [check.list_split(root, config.data, name) for name in names]
    if config.data.val_share is not None:  # parts of one folder leave out the same files
        for other in splits[1:]:
            other.left_out = {}
    workers = worker_count(config.data)
    with progress_bar() as progress:
        for split in splits:
            bar = progress.add_task(f"reading {split.name}", total=len(split.index))
            advance = partial(progress.advance, bar)
            check.examine_split(split, limits(config.data), workers, advance)
    # The parts of one folder tell twice what is wrong with it.
    errors = list(dict.fromkeys(error for split in splits for error in split.errors))
    for other in splits[1:]:
        errors += check.compare_classes(splits[0], other, config.data.allow_subset)
        errors += check.duplicates(splits[0], other)

    fitting = check.value_range_of(splits[0])
    report = {
        "root": str(root),
        "errors": errors,
        "warnings": [
            *_told_of_values(config, splits[0], fitting),
            *dict.fromkeys(warning for split in splits for warning in split.warnings),
        ],
        "splits": {split.name: check.statistics_of(split) for split in splits},
        "value_range": fitting,
        "channels": channel_statistics(
            splits[0].index, config.model.preprocessing, limits(config.data), CHANNEL_IMAGES
        ),
        "timing": time_parts(config, splits[0].index, world.device) if config.timing else None,
    }
    _tell(report)
    if splits[0].bad > config.data.max_bad:
        console.print(f"training would stop: more bad images than data.max_bad={config.data.max_bad}")
    print_report(report)
    if errors:
        raise DataError(f"errors in {root}: {len(errors)}; the first: {errors[0]}")
    return report


def _told_of_values(config: DataCheckConfig, train: check.Split, fitting: list[float] | None) -> list[str]:
    """A line on values of more than 8 bits that another data.value_range would fit better."""
    floats = any(kind.endswith(" F") for kind in train.extents)
    usual = [0.0, 1.0 if floats else 65535.0]
    if fitting is None or fitting == usual or config.data.value_range is not None:
        return []
    spans = ", ".join(f"{kind} {low:g}..{high:g}" for kind, (low, high) in sorted(train.extents.items()))
    low, high = fitting
    return [
        f"{train.name}: values of more than 8 bits are {spans}; data.value_range=[{low:g},{high:g}] fits "
        f"them, where {usual[0]:g}..{usual[1]:g} is black to white without it"
    ]


def _tell(report: dict[str, Any]) -> None:
    splits = report["splits"]
    table = Table("", *splits, title=report["root"])
    for row in ROWS:
        table.add_row(row.replace("_", " "), *(_phrase(statistics[row]) for statistics in splits.values()))
    console.print(table)
    if channels := report["channels"]:
        mean, std = (",".join(f"{value:.4f}" for value in channels[name]) for name in ("mean", "std"))
        console.print(
            f"channels: model.mean=[{mean}] model.std=[{std}] are those of "
            f"{amount(channels['images'], 'training image')}"
        )
    if report["timing"]:
        tell_timing(report["timing"])
    for kind in ("errors", "warnings"):
        for line in report[kind][:SHOWN]:
            console.print(f"{kind[:-1]}: {line}")
        if len(report[kind]) > SHOWN:
            where = "which a pipe gets as JSON: | cat" if console.is_terminal else "in the JSON below"
            console.print(f"... {len(report[kind]) - SHOWN} more {kind}, {where}")
    console.print(f"errors: {len(report['errors'])}, warnings: {len(report['warnings'])}")


def _phrase(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:,}"
    if "median" in value:
        return f"{value['min']:,} .. {value['median']:,} .. {value['max']:,}"
    return ", ".join(f"{count:,} {name}" for name, count in value.items())
