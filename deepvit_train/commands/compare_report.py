"""Write the report of a comparison: a page, its figures, its numbers, and the images that changed sides."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit_train.atomic import replacing, write_text
from deepvit_train.commands.compare_figure import draw_curves, draw_differences
from deepvit_train.commands.compare_group import Contest, Group, contests_of, groups_of
from deepvit_train.commands.compare_name import listed, short_names
from deepvit_train.commands.compare_subject import Subject, changed_keys
from deepvit_train.commands.compare_table import (
    Rows,
    contest_table,
    cost_table,
    group_table,
    pair_table,
    run_table,
)
from deepvit_train.commands.compare_verdict import Pair, conclude, pairs_of
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
from deepvit_train.report.figure import save
from deepvit_train.report.page import inline, render

SHOWN_IMAGES = 12  # of each kind
FLATTERED = (
    "A checkpoint called best was chosen by its accuracy on these very images, which flatters it. To compare "
    "the last ones, give RUN/checkpoints/last for each run."
)


@dataclass(frozen=True)
class Comparison:
    """What was compared, and what was found.

    Args:
        subjects: the models; the first is what the others are compared with.
        groups: the models by configuration.
        contests: every two groups of several seeds.
        pairs: each of the others beside the first, or beside the run of the first group with its seed.
    """

    subjects: list[Subject]
    groups: list[Group]
    contests: list[Contest]
    pairs: list[Pair]

    @classmethod
    def of(cls, subjects: list[Subject]) -> Comparison:
        """Compare models, of which there are two at least."""
        groups = groups_of(subjects)
        contests = contests_of(groups)
        return cls(subjects, groups, contests, pairs_of(groups, contests))

    def content(self) -> dict[str, Any]:
        """Return the content of comparison.json."""
        return {
            "images": len(self.subjects[0].rows),
            "conclusions": conclude(self.pairs, self.groups, self.contests),
            "notes": [FLATTERED] if any(each.is_chosen for each in self.subjects) else [],
            "models": [
                {
                    "label": each.label,
                    "evaluation": str(each.folder),
                    "checkpoint": each.checkpoint,
                    "accuracy": wilson(each.hits, len(each.rows)).plain(),
                    "cost": each.cost(),
                }
                for each in self.subjects
            ],
            "over_seeds": [contest.plain() for contest in self.contests],
            "groups": [group.plain() for group in self.groups],
            "pairs": [pair.plain() for pair in self.pairs],
            "configuration": changed_keys(self.subjects),
        }

    def tables(self) -> dict[str, Rows]:
        """Return the tables by name, in reading order. What would say nothing is left out."""
        found = {"models": run_table(self.subjects), "pairs": pair_table(self.pairs, self.subjects)}
        if len(self.groups) < len(self.subjects):
            found["groups"] = group_table(self.groups)
        if self.contests:
            found["contests"] = contest_table(self.contests)
        return found | {"costs": cost_table(self.subjects)}

    def write(self, folder: Path) -> Path:
        """Write the folder of the report, and return its page. Raises OutputError."""
        content = self.content()
        write_text(folder / "comparison.json", json.dumps(content, indent=1, default=str) + "\n")
        _write_changed(self.subjects, folder / "changed.csv")
        names = short_names([each.label for each in self.subjects])
        figures = {
            "differences": draw_differences(self.contests, self.pairs, names),
            "curves": draw_curves(self.subjects),
        }
        drawn = {
            name: inline(save(figure, folder, name, "png"), name)
            for name, figure in figures.items()
            if figure is not None
        }
        shown = next((pair for pair in self.pairs if not pair.seeds_alone), self.pairs[0])
        first, second = (self._called(label) for label in (shown.first, shown.second))
        galleries = _galleries(first, second, emptied(folder, "images"))
        page = render(
            "deepvit_train.commands",
            "compare_report.html.j2",
            content=content,
            title=self._title(),
            names=list(names.values()),
            tables=self.tables(),
            figures=drawn,
            galleries=galleries,
        )
        write_text(folder / "report.html", page)
        return folder / "report.html"

    def _title(self) -> str:
        """Name what is compared: configurations where seeds are, and else models."""
        return (
            ", ".join(each.name for each in self.groups)
            if self.contests
            else listed([each.label for each in self.subjects])
        )

    def _called(self, label: str) -> Subject:
        return next(each for each in self.subjects if each.label == label)


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


def _galleries(first: Subject, second: Subject, folder: Path) -> list[Gallery]:
    """Write the images that changed sides between two models, the surest ones first."""
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
        index = open_split(data, data.evaluated)
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
