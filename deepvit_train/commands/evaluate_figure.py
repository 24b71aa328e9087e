"""Draw the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from deepvit_train.evaluation.metric import (
    BINS,
    ClassFigures,
    Confusion,
    Reliability,
    Temperature,
    reliability,
)
from deepvit_train.evaluation.prediction import Predictions
from deepvit_train.report.figure import COLOURS, STYLE

READABLE = 30  # classes whose names and counts fit in a matrix
CHOSEN = 20  # classes that are chosen for one where there are more
OVERVIEW = 2000  # classes whose matrix is drawn without names
IN_BARS = 20  # classes that have a bar each; more are counted in a histogram
LONGEST = 24  # letters of a class's name in a figure


def draw_confusion(predictions: Predictions, names: Sequence[str], classes: Sequence[int]) -> Figure:
    """Draw the confusion matrix of some classes with their names, each row in shares of the class's images.

    Args:
        names: of all classes.
        classes: at most READABLE numbers of those to show.
    """
    asked = np.isin(predictions.targets, classes)
    targets, told = predictions.targets[asked], predictions.predicted[asked]
    counts = confusion_matrix(targets, told, labels=list(classes))
    support = np.array([[(targets == each).sum()] for each in classes])
    shares = counts / np.maximum(support, 1)
    size = 2.0 + 0.34 * len(classes)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(size + 0.8, size), layout="constrained")
        axis = figure.subplots()
        axis.grid(False)
        shown = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
        for row, column in np.argwhere(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            text = str(counts[row, column])
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        labels = [_short(names[each]) for each in classes]
        axis.set_xticks(range(len(classes)), labels, rotation=90, fontsize=7, parse_math=False)
        axis.set_yticks(range(len(classes)), labels, fontsize=7, parse_math=False)
        axis.set(xlabel="answer", ylabel="true")
        figure.colorbar(shown, ax=axis, shrink=0.7, label="share of the true class's images")
        return figure


def draw_overview(predictions: Predictions, classes: Sequence[int]) -> Figure:
    """Draw the mistakes among many classes as points, without names."""
    counts = confusion_matrix(predictions.targets, predictions.predicted, labels=list(classes))
    np.fill_diagonal(counts, 0)
    rows, columns = np.nonzero(counts)
    found = counts[rows, columns]
    order = np.argsort(found, kind="stable")  # the frequent ones on top
    ends = (-0.5, len(classes) - 0.5)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 6.6), layout="constrained")
        axis = figure.subplots()
        axis.plot(ends, ends, color="#bbbbbb", linewidth=1)
        colours = LogNorm(1, max(2, found.max(initial=1)))
        shown = axis.scatter(columns[order], rows[order], 5, found[order], cmap="plasma_r", norm=colours)
        axis.set(xlim=ends, ylim=ends[::-1], xlabel="number of the answered class", aspect="equal")
        axis.set_ylabel("number of the true class")
        figure.colorbar(shown, ax=axis, shrink=0.8, label="images")
        return figure


def most_telling(confused: Sequence[Confusion], present: Sequence[int]) -> list[int]:
    """Return the classes to show with names: all if they fit, else those that are confused most."""
    if len(present) <= READABLE:
        return list(present)
    chosen: list[int] = []
    for pair in confused:
        new = [each for each in (pair.true, pair.told) if each not in chosen]
        if len(chosen) + len(new) > CHOSEN:
            break
        chosen += new
    return sorted(chosen)


def draw_reliability(predictions: Predictions, temperature: Temperature | None) -> Figure:
    """Draw accuracy against probability, before and after the temperature, and how many images there are."""
    asked = predictions.answered
    curves: list[tuple[str, Reliability]] = [
        ("as it answers", reliability(predictions.probability[asked], predictions.right[asked]))
    ]
    if temperature is not None:
        curves.append((f"after a temperature of {temperature.value:.3g}, other half", temperature.after))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.6), layout="constrained")
        axis, below = figure.subplots(1, 2, width_ratios=(1, 1))
        axis.plot((0, 1), (0, 1), "--", color="#888888", linewidth=1, label="probability = accuracy")
        for colour, (label, curve) in zip(COLOURS, curves, strict=False):
            axis.plot(curve.probability, curve.accuracy, "o-", color=colour, markersize=4, label=label)
        axis.set(xlabel="probability of the answer", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axis.legend(frameon=False, fontsize=8)
        right, told = predictions.right[asked], predictions.probability[asked]
        edges = np.linspace(0.0, 1.0, BINS + 1)
        parts, kinds = [told[right], told[~right]], ["right", "wrong"]
        below.hist(parts, bins=edges.tolist(), stacked=True, color=COLOURS[:2], label=kinds)
        below.set(xlabel="probability of the answer", ylabel="images")
        below.legend(frameon=False, fontsize=8)
        return figure


def draw_losses(predictions: Predictions) -> Figure:
    """Draw the histogram of the losses of the images, right and wrong ones."""
    finite = np.isfinite(predictions.loss)
    losses, right = predictions.loss[finite], predictions.right[finite]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.2), layout="constrained")
        axis = figure.subplots()
        edges = np.linspace(0.0, max(1e-6, float(losses.max(initial=0.0))), 41)
        axis.hist(
            [losses[right], losses[~right]],
            bins=edges.tolist(),
            stacked=True,
            color=COLOURS[:2],
            label=["right", "wrong"],
        )
        axis.set(xlabel="loss of an image", ylabel="images", yscale="log")
        axis.legend(frameon=False, fontsize=8)
        return figure


def draw_classes(names: Sequence[str], figures: Sequence[ClassFigures]) -> Figure:
    """Draw precision and recall of each class as bars, or of many classes how many have which.

    Args:
        names: of the classes, in the order of their figures.
    """
    return _class_bars(names, figures) if len(figures) <= IN_BARS else _class_histogram(figures)


def _class_bars(names: Sequence[str], figures: Sequence[ClassFigures]) -> Figure:
    """Draw two bars for each class, the first class on top. A share that is not known has no bar."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.1 + 0.4 * len(figures)), layout="constrained")
        axis = figure.subplots()
        places = np.arange(len(figures))
        shares = {
            "precision": [each.precision for each in figures],
            "recall": [each.recall for each in figures],
        }
        for number, (label, values) in enumerate(shares.items()):
            widths = [0.0 if value is None else value for value in values]
            heights, colour = places + 0.4 * (number - 0.5), COLOURS[2 + number]
            bars = axis.barh(heights, widths, 0.36, label=label, color=colour)
            texts = ["not known" if value is None else f"{value:.2f}" for value in values]
            axis.bar_label(bars, texts, padding=2, fontsize=7)
        axis.set_yticks(places, [_short(name) for name in names], parse_math=False)
        axis.invert_yaxis()
        axis.set(xlabel="share", xlim=(0, 1.08), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axis.grid(False, axis="y")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return figure


def _class_histogram(figures: Sequence[ClassFigures]) -> Figure:
    """Draw how many classes have which recall and which precision."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.0), layout="constrained")
        axis = figure.subplots()
        columns = {
            "recall": [each.recall for each in figures if each.recall is not None],
            "precision": [each.precision for each in figures if each.precision is not None],
        }
        edges = np.linspace(0.0, 1.0, 21).tolist()
        axis.hist(list(columns.values()), bins=edges, color=COLOURS[2:4], label=list(columns))
        axis.set(xlabel="share", ylabel="classes")
        axis.legend(frameon=False, fontsize=8)
        return figure


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
