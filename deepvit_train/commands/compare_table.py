"""The rows of a comparison's tables, on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepvit_train.commands.compare_group import Contest, Group
from deepvit_train.commands.compare_name import short_names
from deepvit_train.commands.compare_subject import Subject
from deepvit_train.commands.compare_verdict import Pair
from deepvit_train.evaluation.interval import Estimate, wilson


@dataclass(frozen=True)
class Rows:
    """A table: its title, the names of its columns, and its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def run_table(subjects: Sequence[Subject]) -> Rows:
    """Say of each model what it is, and how good. Its number is what other tables call it by."""
    rows = []
    for number, each in enumerate(subjects, start=1):
        found = wilson(each.hits, len(each.rows))
        accuracy = f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})"
        rows.append([str(number), each.label, each.checkpoint, accuracy])
    return Rows("models", ("", "model", "checkpoint", "accuracy (95 %)"), rows)


def cost_table(subjects: Sequence[Subject]) -> Rows:
    """Say of each model what it costs."""
    names = short_names([each.label for each in subjects])
    units = {
        "parameters": "",
        "train_seconds": " s",
        "train_images_per_s": "",
        "train_memory_mib": " MiB",
        "eval_images_per_s": " images/s",
    }
    rows = []
    for each in subjects:
        cost = each.cost()
        told = [
            "" if (value := cost[name]) is None else f"{value:,.0f}{unit}" for name, unit in units.items()
        ]
        rows.append([names[each.label], *told])
    return Rows("cost", ("model", "parameters", "training", "images/s", "memory", "evaluation"), rows)


def group_table(groups: Sequence[Group]) -> Rows:
    """Say of each configuration how good it is over seeds."""
    rows = [
        [
            group.label,
            f"{group.mean:.4f}",
            "" if group.deviation is None else f"{group.deviation:.4f}",
        ]
        for group in groups
    ]
    return Rows("seeds", ("configuration", "mean accuracy", "deviation over seeds"), rows)


def contest_table(contests: Sequence[Contest]) -> Rows:
    """Say of every two configurations which is better over seeds."""
    rows = [
        [
            each.second.name,
            each.first.name,
            _difference(each.shift.estimate),
            "" if each.p is None else f"{each.p:.2g}",
            each.verdict,
        ]
        for each in contests
    ]
    columns = ("configuration", "beside", "difference, points (95 %)", "p (Welch, Holm)", "verdict")
    return Rows("over seeds", columns, rows)


def pair_table(pairs: Sequence[Pair], subjects: Sequence[Subject]) -> Rows:
    """Say of each pair how many images changed sides. A column of verdicts is there if any pair has one."""
    names = short_names([each.label for each in subjects])
    rows = [
        [
            names[pair.second],
            names[pair.first],
            _difference(pair.difference),
            str(pair.gained),
            str(pair.lost),
            f"{pair.p:.2g}",
            pair.verdict or "see seeds",
        ]
        for pair in pairs
    ]
    columns = ["model", "beside", "difference, points (95 %)", "gained", "lost", "McNemar's p", "verdict"]
    if all(pair.verdict is None for pair in pairs):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Rows("images", columns, rows)


def _difference(found: Estimate) -> str:
    value = f"{100 * found.value:+.2f}"
    if found.low is None or found.high is None:
        return value
    return f"{value} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
