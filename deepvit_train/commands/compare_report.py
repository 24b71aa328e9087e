"""Write the report of a comparison: a page, its figures, its numbers, and the images that changed sides."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from deepvit_train.atomic import replacing, write_text
from deepvit_train.commands.compare_subject import Subject, changed_keys
from deepvit_train.commands.compare_verdict import Group, Pair, conclude
from deepvit_train.commands.evaluate_gallery import Gallery, Picture, emptied, save_picture
from deepvit_train.commands.evaluate_result import readable
from deepvit_train.config.compose import compose_command
from deepvit_train.config.model import Interpolation
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.console import amount, one_line
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.loaders import limits
from deepvit_train.data.pixels import seen_pixels
from deepvit_train.error import ConfigError, DataError
from deepvit_train.evaluation.interval import wilson
from deepvit_train.report.figure import COLOURS, STYLE, Line, Panel, draw_lines, save
from deepvit_train.report.page import inline, render

SHOWN_IMAGES = 12  # of each kind
CURVES = {
    "top-1": ("val_ema/top1", "val/top1"),
    "training loss": ("train/cross_entropy", "train/loss"),
}


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what was found.

    Args:
        subjects: the models; the first is what the others are compared with.
        pairs: each of the others beside the first.
        groups: the models by configuration.
    """

    subjects: list[Subject]
    pairs: list[Pair]
    groups: list[Group]

    def content(self) -> dict[str, Any]:
        """Return the content of comparison.json."""
        first = self.subjects[0]
        return {
            "images": len(first.rows),
            "conclusions": conclude(self.pairs, self.groups),
            "models": [
                {
                    "label": each.label,
                    "evaluation": str(each.folder),
                    "accuracy": wilson(each.hits, len(each.rows)).plain(),
                    "cost": each.cost(),
                }
                for each in self.subjects
            ],
            "pairs": [pair.plain() for pair in self.pairs],
            "groups": [group.plain() for group in self.groups],
            "configuration": changed_keys(self.subjects),
        }

    def write(self, folder: Path) -> Path:
        """Write the folder of the report, and return its page. Raises OutputError."""
        content = self.content()
        write_text(folder / "comparison.json", json.dumps(content, indent=1, default=str) + "\n")
        _write_changed(self.subjects, folder / "changed.csv")
        figures = {"differences": _draw_differences(self.pairs), "curves": _draw_curves(self.subjects)}
        drawn = {
            name: inline(save(figure, folder, name, "png"), name)
            for name, figure in figures.items()
            if figure is not None
        }
        galleries = _galleries(self.subjects, emptied(folder, "images"))
        page = render(
            "deepvit_train.commands",
            "compare_report.html.j2",
            content=content,
            labels=[each.label for each in self.subjects],
            model_columns=MODEL_COLUMNS,
            group_columns=GROUP_COLUMNS,
            pair_columns=PAIR_COLUMNS,
            models=[model_row(each) for each in self.subjects],
            groups=[group_row(each) for each in self.groups],
            pairs=[pair_row(each) for each in self.pairs],
            figures=drawn,
            galleries=galleries,
        )
        write_text(folder / "report.html", page)
        return folder / "report.html"


MODEL_COLUMNS = ("model", "accuracy (95 %)", "parameters", "training", "images/s", "memory", "evaluation")
GROUP_COLUMNS = ("configuration", "runs", "mean accuracy", "deviation over seeds", "beside the first")
PAIR_COLUMNS = ("beside the first", "difference, points (95 %)", "gained", "lost", "McNemar's p", "verdict")


def model_row(subject: Subject) -> list[str]:
    """Return what a table says of a model: accuracy, and what it costs."""
    found, cost = wilson(subject.hits, len(subject.rows)), subject.cost()

    def told(name: str, unit: str) -> str:
        value = cost[name]
        return "" if value is None else f"{value:,.0f}{unit}"

    return [
        subject.label,
        f"{found.value:.4f} ({found.low:.4f} to {found.high:.4f})",
        told("parameters", ""),
        told("train_seconds", " s"),
        told("train_images_per_s", ""),
        told("train_memory_mib", " MiB"),
        told("eval_images_per_s", " images/s"),
    ]


def group_row(group: Group) -> list[str]:
    """Return what a table says of a configuration."""
    deviation = "" if group.deviation is None else f"{group.deviation:.4f}"
    verdict = group.verdict or ""
    if group.shift is not None and group.shift.p is not None:
        verdict = f"{verdict} ({100 * group.shift.estimate.value:+.2f} points, p = {group.shift.p:.2g})"
    return [group.label, str(len(group.runs)), f"{group.mean:.4f}", deviation, verdict]


def pair_row(pair: Pair) -> list[str]:
    """Return what a table says of a pair."""
    found = pair.difference
    ends = f"{100 * (found.low or 0.0):+.2f} to {100 * (found.high or 0.0):+.2f}"
    difference = f"{100 * found.value:+.2f} ({ends})"
    return [pair.second, difference, str(pair.gained), str(pair.lost), f"{pair.p:.2g}", pair.verdict]


def _write_changed(subjects: Sequence[Subject], file: Path) -> None:
    """Write a row for each image that not all models tell right, or wrong: its class, and what each tells."""
    with replacing(file, flush=False) as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "class", *(subject.label for subject in subjects)])
        for path, row in subjects[0].rows.items():
            rows = [subject.rows[path] for subject in subjects]
            if len({each.right for each in rows}) > 1:
                writer.writerow([path, row.label, *(each.prediction for each in rows)])
        text.detach()


def _draw_differences(pairs: Sequence[Pair]) -> Figure:
    """Draw the difference of each model to the first with its interval."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 1.2 + 0.4 * len(pairs)), layout="constrained")
        axis = figure.subplots()
        axis.axvline(0.0, color="#888888", linewidth=1)
        for place, pair in enumerate(pairs):
            low, high = (100 * (end or 0.0) for end in (pair.difference.low, pair.difference.high))
            colour = COLOURS[1 if pair.verdict == "worse" else 2 if pair.verdict == "better" else 0]
            axis.plot((low, high), (place, place), color=colour, linewidth=2)
            axis.plot((100 * pair.difference.value,), (place,), "o", color=colour)
        axis.set_yticks(range(len(pairs)), [pair.second for pair in pairs], parse_math=False)
        axis.set(ylim=(len(pairs) - 0.5, -0.5))
        axis.set_xlabel(f"accuracy minus that of {pairs[0].first}, points", parse_math=False)
        return figure


def _draw_curves(subjects: Sequence[Subject]) -> Figure | None:
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


def _galleries(subjects: Sequence[Subject], folder: Path) -> list[Gallery]:
    """Write the images that changed sides between the first model and the second, the surest ones first."""
    first, second = subjects[:2]
    pairs = [(row, second.rows[path]) for path, row in first.rows.items()]
    index = _index_of(first)
    found = []
    for name, right, wrong in (("gained", second, first), ("lost", first, second)):
        changed = [(a, b) for a, b in pairs if (b if right is second else a).right and a.right != b.right]
        # The wrong one that is surest comes first.
        changed.sort(key=lambda both: -(both[0] if right is second else both[1]).probability)
        pictures = []
        for rank, (a, b) in enumerate(changed[:SHOWN_IMAGES]):
            file = index and _picture(first, index, a.path, folder / f"{name}_{rank + 1:02}.png")
            if file:
                told = [
                    f"{each.label}: {readable(row.prediction) or 'no answer'} ({row.probability:.3f})"
                    for each, row in ((first, a), (second, b))
                ]
                pictures.append(Picture(file, [f"true: {readable(a.label)}", *told, a.path]))
        text = f"{amount(len(changed), 'image')}; those that {wrong.label} was surest of come first."
        if changed and not pictures:
            text += " The images themselves are not there any more."
        found.append(Gallery(f"Which images does {right.label} alone tell right?", text, pictures))
    return found


def _index_of(subject: Subject) -> tuple[ImageIndex, dict[str, int]] | None:
    """Return the split that was evaluated, and the number of each path; None if it is gone."""
    content = subject.content
    root = [] if content["root"] is None else [f"data.root={content['root']}"]
    try:
        typed = ["checkpoint=none", f"data={content['data']}", *root, f"data.split={content['split']}"]
        data = compose_command("eval", typed).data
        index = open_split(data, data.split)
    except (ConfigError, DataError):
        return None
    above = len(f"{index.folder}/")
    return index, {one_line(index.path(image)[above:]): image for image in range(len(index))}


def _picture(
    subject: Subject, split: tuple[ImageIndex, dict[str, int]], path: str, file: Path
) -> Path | None:
    index, numbers = split
    said = subject.content["preprocessing"]
    preprocessing = Preprocessing(
        subject.content["image_size"],
        tuple(said["mean"]),
        tuple(said["std"]),
        said["crop_pct"],
        Interpolation(said["interpolation"]),
    )
    data = compose_command("eval", ["checkpoint=none"]).data
    pixels = seen_pixels(index, numbers[path], preprocessing, limits(data)) if path in numbers else None
    return None if pixels is None else save_picture(pixels, file)
