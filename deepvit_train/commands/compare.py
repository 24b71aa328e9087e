"""`deepvit-compare` tells which of several models is better on the same images, and how sure that is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from deepvit_train.atomic import make_folder
from deepvit_train.commands.compare_name import folder_name
from deepvit_train.commands.compare_report import (
    GROUP_COLUMNS,
    MODEL_COLUMNS,
    PAIR_COLUMNS,
    Comparison,
    group_row,
    model_row,
    pair_row,
)
from deepvit_train.commands.compare_subject import Subject, load_subjects
from deepvit_train.commands.compare_verdict import conclude, groups_of, pair_of
from deepvit_train.config.compare import CompareConfig
from deepvit_train.console import amount, console, print_report
from deepvit_train.error import OutputError


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare models, print tables, and write a report.

    The last line is a JSON object. Returns it. Raises CheckpointError or DataError where the models can't be
    compared, OutputError where the report can't be written.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    subjects = load_subjects(config)
    pairs = [pair_of(subjects[0], other) for other in subjects[1:]]
    comparison = Comparison(subjects, pairs, groups_of(subjects))
    _show("models", MODEL_COLUMNS, map(model_row, subjects))
    _show(f"on the same {amount(len(subjects[0].rows), 'image')}", PAIR_COLUMNS, map(pair_row, pairs))
    if len(comparison.groups) < len(subjects):
        _show("seeds", GROUP_COLUMNS, map(group_row, comparison.groups))
    for line in conclude(pairs, comparison.groups):
        console.print(line)
    page = comparison.write(_folder(config, subjects))
    console.print(f"read: {page}")
    content = comparison.content()
    report = {
        "images": content["images"],
        "accuracy": {each["label"]: each["accuracy"]["value"] for each in content["models"]},
        "pairs": [
            {key: pair[key] for key in ("first", "second", "difference", "p", "verdict")}
            for pair in content["pairs"]
        ],
        "report": str(page),
    }
    print_report(report)
    return report


def _show(title: str, columns: Sequence[str], rows: Any) -> None:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _folder(config: CompareConfig, subjects: Sequence[Subject]) -> Path:
    """Make the folder of the report. By default it lies in the first run, and is named by the others.

    The same evaluations in the same order get the same folder, and no others get it. Runs that move together
    keep it.
    """
    home = subjects[0].run or subjects[0].folder
    paths = [os.path.relpath(subject.folder.resolve(), home.resolve()) for subject in subjects]
    name = folder_name([subject.label for subject in subjects[1:]], paths)
    place, names = home, ["comparison", name]
    if config.out is not None:
        place, names = Path(config.out).expanduser(), []
    try:
        return make_folder(place, *names)
    except OSError as error:
        raise OutputError(f"{place.joinpath(*names)}: can't be written ({error.strerror})") from None
