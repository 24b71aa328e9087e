"""Draw figures with matplotlib, without its global state. A caption gives the definition of what is shown."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deepvit_train.atomic import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart too; a grey stands for their yellow.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c8c8c"]
DOTS = 150  # of a PNG in an inch
LETTERS = 16  # of a caption in an inch
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "deepvit_train",  # a figure drawn again gives the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
}


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Args:
        label: its name in the legend; '' for none, where the panel's title says enough.
        x, y: its points.
        colour: index in COLOURS; after the last colour the first comes again.
        style: as matplotlib writes it; '--' for an untrained model.
        spread: a standard deviation for each point, drawn as a band; None: no band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    style: str = "-"
    spread: Sequence[float] | None = None


@dataclass(frozen=True)
class Panel:
    """A plot of lines. `y_range` fixes the ends of the y axis; where it is None matplotlib chooses."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    y_range: tuple[float | None, float | None] | None = None


def draw_lines(panels: Sequence[Panel], caption: str) -> Figure:
    """Draw panels of lines side by side, with one legend, and the caption below."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.5 + 4.0 * len(panels), 3.6), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axis, panel in zip(axes, panels, strict=True):
            for line in panel.lines:
                colour = COLOURS[line.colour % len(COLOURS)]
                (handle,) = axis.plot(
                    line.x, line.y, line.style, color=colour, marker="o", markersize=3, linewidth=1.4
                )
                if line.label:
                    handles[line.label] = handle
                if line.spread is not None:
                    low = [y - spread for y, spread in zip(line.y, line.spread, strict=True)]
                    high = [y + spread for y, spread in zip(line.y, line.spread, strict=True)]
                    axis.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            _mark_steps(axis, {x for line in panel.lines for x in line.x})
            if panel.y_range is not None:
                axis.set_ylim(*panel.y_range)
        if handles:
            names, where = handles.keys(), "outside right upper"
            figure.legend(handles.values(), names, loc=where, frameon=False, fontsize=8)
        _write_caption(figure, caption)
        return figure


def _mark_steps(axis: Any, found: set[float]) -> None:
    """Label few places of the x axis, all of them whole numbers, so that no label lies on another."""
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.ticklabel_format(axis="x", style="plain")
    axis.ticklabel_format(useOffset=False)  # an offset above the axis would lie on the title
    if len(found) == 1:
        axis.set_xticks(list(found))


def share_axes(figures: Sequence[Figure]) -> None:
    """Give the panels of several figures that show the same the same ends of their axes."""
    panels = [[axis for axis in figure.axes if axis.lines] for figure in figures]
    for same in zip(*panels, strict=False):
        x = [end for axis in same for end in axis.get_xlim()]
        y = [end for axis in same for end in axis.get_ylim()]
        for axis in same:
            axis.set(xlim=(min(x), max(x)), ylim=(min(y), max(y)))


@dataclass(frozen=True)
class Heat:
    """One heat map of `values` (rows, columns)."""

    title: str
    values: Any


def draw_heat(
    rows: Sequence[Sequence[Heat]], limits: tuple[float, float], caption: str, labels: tuple[str, str]
) -> Figure:
    """Draw rows of heat maps with one scale of colours.

    Args:
        rows: the heat maps of each row, from left to right.
        limits: values at the two ends of the colours; if they are -x and x, colours diverge from 0.
        caption: the line below the figure.
        labels: names of the x and y axes.
    """
    colours = "RdBu_r" if limits[0] == -limits[1] else "viridis"
    width = max(len(row) for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 2.0 * width, 0.7 + 2.1 * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), width, squeeze=False)
        shown: Any = None
        for row, cells in zip(axes, rows, strict=True):
            for axis in row:
                axis.set_axis_off()
            for axis, heat in zip(row, cells, strict=False):
                axis.set_axis_on()
                axis.grid(False)
                shown = axis.imshow(heat.values, cmap=colours, vmin=limits[0], vmax=limits[1])
                axis.set_title(heat.title, fontsize=8)
                axis.tick_params(labelsize=6)
                for side in (axis.xaxis, axis.yaxis):
                    side.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.colorbar(shown, ax=axes, shrink=0.8)
        _write_caption(figure, caption, f"{labels[0]}\n")
        figure.supylabel(labels[1], fontsize=8, color="#555555")
        return figure


def draw_overlays(
    rows: Sequence[tuple[str, Any, Sequence[Any]]], blocks: Sequence[int], caption: str
) -> Figure:
    """Draw images, and beside each the same image overlaid with the attention of several blocks.

    Args:
        rows: for each image what is written above it, the image (height, width, 3) in 0..1, and for each
            block the weights (rows, columns) of the patches.
        blocks: numbers of the blocks, one for each column.
        caption: the line below the figure.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.3 * (len(blocks) + 1), 1.6 * len(rows) + 0.5), layout="constrained")
        axes = figure.subplots(len(rows), len(blocks) + 1, squeeze=False)
        for row, (label, image, overlays) in zip(axes, rows, strict=True):
            extent = (0, image.shape[1], image.shape[0], 0)
            for axis in row:
                axis.imshow(image, extent=extent, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.grid(False)
            row[0].set_title(label, fontsize=7, loc="left")
            for axis, weights in zip(row[1:], overlays, strict=True):
                axis.imshow(weights, extent=extent, cmap="inferno", alpha=0.75, interpolation="nearest")
        for axis, block in zip(axes[0][1:], blocks, strict=True):
            axis.set_title(f"block {block}", fontsize=8)
        _write_caption(figure, caption)
        return figure


def draw_bars(
    names: Sequence[str], series: Mapping[str, Sequence[float]], y_label: str, caption: str
) -> Figure:
    """Draw a group of bars for each name, with one bar for each series."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.2), layout="constrained")
        axis = figure.subplots()
        width = 0.8 / len(series)
        for number, (label, values) in enumerate(series.items()):
            places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(names))]
            bars = axis.bar(places, values, width * 0.95, label=label, color=COLOURS[number])
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks(range(len(names)), names)
        axis.set(ylabel=y_label, ylim=(0, 1.1))
        axis.legend(frameon=False, fontsize=8)
        _write_caption(figure, caption)
        return figure


def _write_caption(figure: Figure, caption: str, above: str = "") -> None:
    """Write the caption below a figure, in as many lines as its width needs."""
    lines = wrap(caption, round(LETTERS * figure.get_figwidth()), break_long_words=False)
    figure.supxlabel(above + "\n".join(lines), fontsize=8, color="#555555")


def save(figure: Figure, folder: Path, name: str, kind: str | None = None) -> Path:
    """Write the figure to folder/NAME.svg, or to NAME.png if it shows photographs. Returns the file.

    Letters that matplotlib's font lacks become boxes. Raises OutputError if it can't be written.

    Args:
        kind: 'svg' or 'png' whatever it shows.
    """
    shown: list[Any] = [image.get_array() for axis in figure.axes for image in axis.images]
    kind = kind or ("png" if any(pixels.ndim == 3 for pixels in shown) else "svg")
    options: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": DOTS}
    file = folder / f"{name}.{kind}"
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(drawn := io.BytesIO(), format=kind, **options)
    with replacing(file, flush=False) as opened:
        opened.write(drawn.getvalue())
    return file
