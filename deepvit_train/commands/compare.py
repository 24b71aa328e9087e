"""`deepvit-compare` tells which of several models is better on the same images, and how sure that is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from deepvit_train.atomic import make_folder
from deepvit_train.commands.compare_name import folder_name
from deepvit_train.commands.compare_report import Comparison
from deepvit_train.commands.compare_subject import Subject, load_subjects
from deepvit_train.commands.compare_table import Rows
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
    comparison = Comparison.of(load_subjects(config))
    content, tables = comparison.content(), comparison.tables()
    told = [*content["conclusions"], *content["notes"]]
    console.print(f"compared on the same {amount(content['images'], 'image')}")
    if comparison.contests:  # what seeds say comes before what single checkpoints say
        _show([tables.pop("contests"), tables.pop("groups")])
        _say(told)
        _show(tables.values())
    else:
        _show(tables.values())
        _say(told)
    page = comparison.write(_folder(config, comparison.subjects))
    console.print(f"read: {page}")
    report = {
        "images": content["images"],
        "accuracy": {each["label"]: each["accuracy"]["value"] for each in content["models"]},
        "pairs": [
            {key: pair[key] for key in ("first", "second", "difference", "p", "verdict")}
            for pair in content["pairs"]
        ],
        "over_seeds": [
            {key: each[key] for key in ("first", "second", "difference", "p", "p_holm", "verdict")}
            for each in content["over_seeds"]
        ],
        "report": str(page),
    }
    print_report(report)
    return report


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line)


def _show(tables: Iterable[Rows]) -> None:
    for each in tables:
        # A cell that is too long goes on in the next line: cut, two names could look the same.
        table = Table(*[Column(name, overflow="fold") for name in each.columns], title=each.title)
        for row in each.rows:
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
