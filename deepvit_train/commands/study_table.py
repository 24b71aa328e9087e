"""Show a study's cells as a table and as the paper's figures, with standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, nan
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.config.study import GridConfig
from deepvit_train.console import amount
from deepvit_train.report.figure import Line, Panel, draw_lines

Cell = dict[str, Any]  # the JSON of a finished cell
Value = Callable[[Cell], float]

AXIS = "column"  # as in the paper's Eq. 2; the cells hold values for rows too
STATES = {"trained": "-", "untrained": "--"}


def similarity(state: str, maps: str, metric: str, what: str) -> Value:
    """Return a function that reads a number from a cell.

    `what` is 'ratio' or 'count' for the similar blocks, or 'to_previous' for the mean similarity to the
    block before.
    """
    return lambda cell: cell[state]["similar_blocks"][f"{maps}/{metric}/{AXIS}"][what]


COLUMNS: dict[str, Value] = {
    "top-1, calibrated": lambda cell: cell["accuracy"]["calibrated"]["top1"],
    "top-1, running statistics": lambda cell: cell["accuracy"]["running"]["top1"],
    "training loss": lambda cell: cell["train_loss"],
    "similar blocks, raw": similarity("trained", "pre_mix", "raw", "count"),
    "untrained": similarity("untrained", "pre_mix", "raw", "count"),
    "similarity, raw": similarity("trained", "pre_mix", "raw", "to_previous"),
    "untrained ": similarity("untrained", "pre_mix", "raw", "to_previous"),
    "similarity, centred": similarity("trained", "pre_mix", "centred", "to_previous"),
    "untrained  ": similarity("untrained", "pre_mix", "centred", "to_previous"),
    "similarity, post-norm": similarity("trained", "post_norm", "raw", "to_previous"),
}


def table(cells: Sequence[Cell]) -> str:
    """Return a Markdown table with a row for each depth, width and attention.

    The values are means over seeds, with the standard deviation: 'mean ± deviation'.
    """
    header = ["blocks", "dim", "attention", "seeds", *[name.strip() for name in COLUMNS]]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (depth, dim, attn), members in sorted(_groups(cells).items()):
        values = [_phrase([value(cell) for cell in members]) for value in COLUMNS.values()]
        rows.append("| " + " | ".join([str(depth), str(dim), attn, str(len(members)), *values]) + " |")
    return "\n".join(rows) + "\n"


def figures(cells: Sequence[Cell], grid: GridConfig, collapse: CollapseConfig) -> dict[str, Figure]:
    """Draw the paper's figures, as far as the finished cells allow. Returns them by file name."""
    square = [cell for cell in cells if cell["dim"] == grid.dim and cell["depth"] in grid.depths]
    series = [cell for cell in cells if cell["depth"] == grid.width_depth and cell["dim"] in grid.widths]
    mark = f"similar: {AXIS} cosine > {collapse.threshold:g} to the {collapse.k} before (mean)"
    over = "bands: standard deviation over seeds"
    found: dict[str, Figure] = {}
    if square:
        deepest = max(cell["depth"] for cell in square)
        last = [cell for cell in square if cell["depth"] == deepest]
        found["accuracy"] = draw_lines(
            [Panel("accuracy", "blocks", "top-1", _accuracy(square))], f"validation images; {over}"
        )
        found["similar_blocks"] = draw_lines(_ratios(square, "depth", "blocks"), f"{mark}; {over}")
        found["similarity"] = draw_lines(
            _by_block(last, lambda metric: f"similarity/pre_mix/{metric}/{AXIS}"),
            f"{AXIS} cosine of each block's maps to the block before, {amount(deepest, 'block')}; {over}",
        )
        found["head_similarity"] = draw_lines(
            _by_block(last, lambda metric: f"heads/pre_mix/{metric}/{AXIS}"),
            f"{AXIS} cosine between heads of one block, {amount(deepest, 'block')}; {over}",
        )
        features = {"to the last block": "features", "between tokens of a block": "tokens"}
        panels = [
            Panel(title, "block", "cosine of features", _curves(last, name))
            for title, name in features.items()
        ]
        found["feature_cosine"] = draw_lines(panels, f"{amount(deepest, 'block')}; {over}")
    if len({cell["dim"] for cell in series}) > 1:
        caption = f"{mark}; {amount(grid.width_depth, 'block')}; {over}"
        found["width"] = draw_lines(_ratios(series, "dim", "dim"), caption)
    return found


def _accuracy(cells: Sequence[Cell]) -> list[Line]:
    lines = []
    for colour, (attn, members) in enumerate(_by_attention(cells).items()):
        for label, style in (("calibrated", "-"), ("running statistics", ":")):
            if label != "calibrated" and attn == "self":
                continue  # plain attention has no statistics to calibrate
            value = COLUMNS[f"top-1, {label}"]
            lines.append(_line(f"{attn}, {label}", members, "depth", value, colour, style))
    return lines


def _ratios(cells: Sequence[Cell], key: str, label: str) -> list[Panel]:
    """Plot the ratio of similar blocks: one panel for raw and one for centred maps."""
    panels = []
    for metric in ("raw", "centred"):
        lines = []
        for colour, (attn, members) in enumerate(_by_attention(cells).items()):
            for state, style in STATES.items():
                value = similarity(state, "pre_mix", metric, "ratio")
                lines.append(_line(f"{attn}, {state}", members, key, value, colour, style))
            if attn != "self":
                value = similarity("trained", "post_norm", metric, "ratio")
                lines.append(_line(f"{attn}, trained, post-norm", members, key, value, colour + 2, "-."))
        panels.append(Panel(f"{metric} maps", label, "ratio of similar blocks", lines, (-0.03, 1.03)))
    return panels


def _by_block(cells: Sequence[Cell], name: Callable[[str], str]) -> list[Panel]:
    return [
        Panel(f"{metric} pre-mix maps", "block", "cosine", _curves(cells, name(metric)))
        for metric in ("raw", "centred")
    ]


def _curves(cells: Sequence[Cell], name: str) -> list[Line]:
    """Return the lines of a measure over blocks, averaged over seeds, for each attention and state."""
    lines = []
    for colour, (attn, members) in enumerate(_by_attention(cells).items()):
        for state, style in STATES.items():
            curves = list(zip(*[cell[state]["by_block"][name] for cell in members], strict=True))
            blocks = [block for block, values in enumerate(curves) if None not in values]
            y = [mean(curves[block]) for block in blocks]
            spread = [_deviation(curves[block]) for block in blocks]
            lines.append(Line(f"{attn}, {state}", blocks, y, colour, style, spread))
    return lines


def _line(label: str, cells: Sequence[Cell], key: str, value: Value, colour: int, style: str) -> Line:
    by_key: dict[int, list[float]] = {}
    for cell in cells:
        by_key.setdefault(cell[key], []).append(value(cell))
    x = sorted(by_key)
    y, spread = [mean(by_key[place]) for place in x], [_deviation(by_key[place]) for place in x]
    return Line(label, x, y, colour, style, spread)


def _groups(cells: Sequence[Cell]) -> dict[tuple[int, int, str], list[Cell]]:
    groups: dict[tuple[int, int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["depth"], cell["dim"], cell["attn"]), []).append(cell)
    return groups


def _by_attention(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["attn"] != "self", cell["attn"])):
        found.setdefault(cell["attn"], []).append(cell)
    return found


def _phrase(values: list[float]) -> str:
    return f"{mean(values):.4g} ± {_deviation(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}"


def _deviation(values: Sequence[float]) -> float:
    if not all(map(isfinite, values)):
        return nan
    return stdev(values) if len(values) > 1 else 0.0
