"""Draw the figures of a comparison: differences with their intervals, and curves over one another."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from deepvit_train.commands.compare_group import Contest
from deepvit_train.commands.compare_subject import Subject
from deepvit_train.commands.compare_verdict import Pair
from deepvit_train.report.figure import COLOURS, STYLE, Line, Panel, draw_lines

CURVES = {
    "top-1": ("val_ema/top1", "val/top1"),
    "training loss": ("train/cross_entropy", "train/loss"),
}


def draw_differences(contests: Sequence[Contest], pairs: Sequence[Pair], names: dict[str, str]) -> Figure:
    """Draw each difference with its interval: those over seeds, and then those of pairs."""
    found = [
        (f"{each.second.name} beside {each.first.name}", each.shift.estimate, each.verdict)
        for each in contests
    ] + [
        (f"{names[pair.second]} beside {names[pair.first]}", pair.difference, pair.verdict) for pair in pairs
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.2 + 0.4 * len(found)), layout="constrained")
        axis = figure.subplots()
        axis.axvline(0.0, color="#888888", linewidth=1)
        for place, (_, difference, verdict) in enumerate(found):
            colour = COLOURS[1 if verdict == "worse" else 2 if verdict == "better" else 0]
            width = 4 if place < len(contests) else 2
            if difference.low is not None and difference.high is not None:
                ends = 100 * difference.low, 100 * difference.high
                axis.plot(ends, (place, place), color=colour, linewidth=width)
            axis.plot((100 * difference.value,), (place,), "o", color=colour)
        axis.set_yticks(range(len(found)), [name for name, _, _ in found], parse_math=False)
        axis.set(ylim=(len(found) - 0.5, -0.5))
        thick = " (thick: over seeds)" if contests else ""
        axis.set_xlabel(f"difference of the accuracies, points{thick}")
        return figure


def draw_curves(subjects: Sequence[Subject]) -> Figure | None:
    """Draw the curves of all runs over one another; None if no run logged any."""
    panels = []
    for title, names in CURVES.items():
        curves = [(subject.label, *subject.curve(*names)) for subject in subjects]
        lines = [
            Line(label.replace("$", r"\$"), steps, values, colour)
            for colour, (label, steps, values) in enumerate(curves)
            if steps
        ]
        if lines:
            panels.append(Panel(title, "step", title, lines))
    return draw_lines(panels, "as the runs logged them") if panels else None
