"""Draw the findings of a study: learning rates, depths, paired differences, and measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from deepvit_train.commands.study_finding import MARGIN, MEASURES
from deepvit_train.console import amount
from deepvit_train.report.figure import COLOURS, STYLE

Row = dict[str, Any]
MARKS = "osD^vP*X"


def draw_findings(found: Row, cells: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """Draw what the finished cells allow. Returns the figures by file name."""
    state = f"{found['finished']} of {found['cells']} cells"
    with matplotlib.rc_context(STYLE):
        figures = {
            "rates": _rates(found, state) if found["search"] else None,
            "depths": _depths(found, state) if found["accuracy"] else None,
            "differences": _forest(found, state) if found["against_first"] else None,
            "measures": _measures(found, cells, state) if found["measures"] else None,
        }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _look(found: Row, arm: str) -> dict[str, Any]:
    place = found["arms"].index(arm)
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKS[place % len(MARKS)], "markersize": 4}


def _rates(found: Row, state: str) -> Figure:
    depths = sorted({row["depth"] for row in found["search"]})
    figure = Figure(figsize=(1.5 + 3.2 * len(depths), 3.4), layout="constrained")
    handles = {}
    for axis, depth in zip(figure.subplots(1, len(depths), squeeze=False)[0], depths, strict=True):
        for row in found["search"]:
            if row["depth"] == depth:
                rates = [float(rate) for rate in row["top1"]]
                (handles[row["arm"]],) = axis.plot(rates, [*row["top1"].values()], **_look(found, row["arm"]))
        axis.set(
            xscale="log", title=amount(depth, "block"), xlabel="learning rate", ylabel="top-1 of the search"
        )
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.supxlabel("held-out training images; one line an arm", fontsize=8, color="#555555")
    return figure


def _depths(found: Row, state: str) -> Figure:
    depths = sorted({row["depth"] for row in found["accuracy"]})
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axis, handles = figure.subplots(), {}
    for row in found["accuracy"]:
        place = depths.index(row["depth"]) + 0.09 * (found["arms"].index(row["arm"]) - len(found["arms"]) / 2)
        look = _look(found, row["arm"])
        axis.plot([place - 0.02] * row["seeds"], [*row["top1"].values()], ".", color=look["color"], alpha=0.4)
        handles[row["arm"]] = axis.errorbar(
            place + 0.02,
            row["mean"],
            None if row["low"] != row["low"] else [[row["mean"] - row["low"]], [row["high"] - row["mean"]]],
            capsize=2,
            **look,
        )
    axis.set_xticks(range(len(depths)), map(str, depths))
    axis.set(xlabel="blocks", ylabel="top-1, points")
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    figure.supxlabel(f"dots: seeds; bars: 95 % intervals of the mean; {state}", fontsize=8, color="#555555")
    return figure


def _forest(found: Row, state: str) -> Figure:
    rows = found["against_first"]
    figure = Figure(figsize=(7, 1 + 0.28 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        look = _look(found, row["arm"])
        axis.plot(row["differences"], [place] * row["seeds"], ".", color=look["color"], alpha=0.4)
        half = None if row["low"] != row["low"] else row["high"] - row["mean"]
        axis.errorbar(row["mean"], place, xerr=half, capsize=2, **look)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.axvspan(-MARGIN, MARGIN, color="grey", alpha=0.12, linewidth=0)
    axis.set_yticks(range(len(rows)), [f"{row['arm']}, {amount(row['depth'], 'block')}" for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(f"top-1 less that of {found['arms'][0]}, points")
    caption = f"dots: pairs of one seed; bars: 95 % intervals; grey: +-{MARGIN:g} points; {state}"
    figure.supxlabel(caption, fontsize=8, color="#555555")
    return figure


def _measures(found: Row, cells: Sequence[dict[str, Any]], state: str) -> Figure:
    known = {row["measure"]: row for row in found["measures"]}
    names = [name for name in MEASURES if name in known]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns + 1.2, 2.3 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    handles = {}
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=False):
        for arm in found["arms"]:
            points = [
                (cell["early"][name], 100 * cell["accuracy"]["calibrated"]["top1"])
                for cell in cells
                if cell["attn"] == arm and "accuracy" in cell and name in (cell.get("early") or {})
            ]
            if points:
                (handles[arm],) = axis.plot(*zip(*points, strict=True), linestyle="", **_look(found, arm))
        axis.set_title(f"{name.partition('/')[2]}: {known[name]['rho']:+.2f}", fontsize=8)
        axis.tick_params(labelsize=6)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    caption = f"x: the measure at a fifth of the training; y: top-1 at the end, points; {state}"
    figure.supxlabel(caption, fontsize=8, color="#555555")
    return figure
