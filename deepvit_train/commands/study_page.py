"""Write the findings of a study as a page of Markdown, each table with the number of seeds it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepvit_train.commands.study_finding import MARGIN
from deepvit_train.console import amount

Row = dict[str, Any]


def page(found: Row) -> str:
    """Return the page. A study that is not finished says so in its first line."""
    finished, cells = found["finished"], found["cells"]
    state = "All" if finished == cells else "**This study is not finished.**"
    lines = ["# What the cells of the study say", ""]
    lines += [f"{state} {finished} of {cells} cells are in. Accuracies are in points of top-1.", ""]
    if found["searches"]:
        lines += [
            f"Of the search for learning rates {found['searched']} of {found['searches']} cells are in.",
            "",
        ]
    if finished < cells:
        lines += ["Its intervals and p-values are no results: the plan reads them at the end.", ""]
    elif any(row["seeds"] < found.get("seeds", 0) for row in found["accuracy"]):
        lines += ["Rows of fewer seeds belong to studies in the same folder that are not finished.", ""]
    sections = {
        "Learning rates": _search(found["search"]),
        "Accuracy": _accuracy(found["accuracy"]),
        "Differences to the first arm": _contrasts(found["against_first"]),
        "Tests": _tests(found),
        "Measures at a fifth of the training": _measures(found["measures"]),
    }
    shown = {title: rows for title, rows in sections.items() if rows}
    lines += [*(f"- [{title}](#{title.lower().replace(' ', '-')})" for title in shown), ""]
    for title, rows in shown.items():
        lines += [f"## {title}", "", *rows, ""]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _search(rows: list[Row]) -> list[str]:
    """Return the accuracy of the search by rate; the best is bold."""
    rates = sorted({rate for row in rows for rate in row["top1"]}, key=float)
    shown = [
        [
            row["arm"],
            str(row["depth"]),
            *(_best(row, rate) for rate in rates),
            "yes" if row["at_end"] else "",
        ]
        for row in rows
    ]
    return _table(["arm", "blocks", *rates, "best is at an end"], shown)


def _best(row: Row, rate: str) -> str:
    if rate not in row["top1"]:
        return ""
    text = f"{row['top1'][rate]:.2f}"
    return f"**{text}**" if float(rate) == row["best"] else text


def _accuracy(rows: list[Row]) -> list[str]:
    shown = [
        [
            str(row["depth"]),
            row["arm"],
            "" if row["rate"] is None else f"{row['rate']:g}",
            str(row["seeds"]),
            f"{row['mean']:.2f}",
            span(row["low"], row["high"], sign=""),
            " ".join(f"{value:.2f}" for value in row["top1"].values()),
        ]
        for row in rows
    ]
    return _table(["blocks", "arm", "rate", "seeds", "mean", "95 %", "each seed"], shown)


def _contrasts(rows: list[Row]) -> list[str]:
    shown = [
        [
            str(row["depth"]),
            f"{row['arm']} - {row['against']}",
            str(row["seeds"]),
            f"{row['mean']:+.2f}",
            span(row["low"], row["high"]),
            _seeds(row),
        ]
        for row in rows
    ]
    return _table(["blocks", "difference", "seeds", "mean", "95 %", "each seed"], shown)


def _tests(found: Row) -> list[str]:
    if not found.get("secondary"):
        return []
    rows = []
    if (primary := found["primary"]) is not None:
        gain = f"{found['subject']} - {found['arms'][0]}"
        what = f"primary: ({gain}) at {found['deep']} less at {amount(found['shallow'], 'block')}"
        rows.append([what, *_tested(primary, ""), _seeds(primary)])
    for row in found["secondary"]:
        what = f"{row['arm']} - {row['against']} at {amount(row['depth'], 'block')}"
        rows.append([what, *_tested(row, f"{row['p_holm']:.4f}"), _seeds(row)])
    lines = _table(["test", "seeds", "mean", "95 %", "p", "p, Holm", "each seed"], rows)
    if (row := found["best_control"]) is not None:
        verdict = "equivalent" if row["equivalent"] else "not shown to be equivalent"
        lines += [
            "",
            f"The best control by the search is {row['against']}. {row['arm']} - {row['against']} has the "
            f"90 % interval {span(row['low90'], row['high90'])} over {row['seeds']} seeds: {verdict} within "
            f"{MARGIN:g} points.",
        ]
    return lines


def _tested(row: Row, holm: str) -> list[str]:
    mean, ends = f"{row['mean']:+.2f}", span(row["low"], row["high"])
    return [str(len(row["differences"])), mean, ends, f"{row['p']:.4f}", holm]


def _seeds(row: Row) -> str:
    return " ".join(f"{value:+.2f}" for value in row["differences"])


def _measures(rows: list[Row]) -> list[str]:
    shown = [
        [
            row["measure"],
            str(row["cells"]),
            f"{row['rho']:+.2f}",
            span(row["low"], row["high"]),
            span(*row["without_an_arm"]),
            f"{row['within_depths']:+.2f}",
            "yes" if row["predicts"] else "no",
        ]
        for row in rows
    ]
    return _table(
        ["measure", "cells", "Spearman", "95 %", "without one arm", "within depths", "predicts"], shown
    )


def span(low: float, high: float, sign: str = "+") -> str:
    """Return an interval as text: '-0.12 to +0.30'; '' where there is none."""
    return "" if low != low else f"{low:{sign}.2f} to {high:{sign}.2f}"
