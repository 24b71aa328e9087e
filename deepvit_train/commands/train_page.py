"""The page of a run: curves.png, and report.html, one file that tells how the run went and what made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from deepvit_train.atomic import write_text
from deepvit_train.commands.train_job import Job
from deepvit_train.console import amount
from deepvit_train.reading import read_json, read_json_lines
from deepvit_train.report.figure import Line, Panel, draw_lines, save
from deepvit_train.report.page import inline, render
from deepvit_train.training.validation import COUNTS, phrase, phrase_best

POINTS = 300  # of a curve; more of them are averaged in groups
BAD_FILES = 100  # that are listed

# Curves of a figure: for each panel its title, the name of its y axis, and its curves by their labels. A
# label has one colour in a figure; a curve without one is what the title says.
Panels = Sequence[tuple[str, str, dict[str, str]]]
VALIDATION, AVERAGED = "validation", "validation, averaged weights"
TRAINING: Panels = [
    (
        "loss",
        "cross-entropy",
        {
            "training, as it is minimised": "train/loss",
            "training, plain targets": "train/cross_entropy",
            VALIDATION: "val/loss",
            AVERAGED: "val_ema/loss",
        },
    ),
    ("top-1", "share of images", {VALIDATION: "val/top1", AVERAGED: "val_ema/top1"}),
    ("learning rate", "", {"": "train/lr"}),
]
SPEED: Panels = [
    ("speed", "images a second", {"": "train/images_per_s"}),
    ("waiting for data", "share of the time", {"": "train/data_wait"}),
    ("norm of the gradient", "", {"": "train/grad_norm"}),
]
COLLAPSE: Panels = [
    ("tokens of the last block", "mean cosine to each other", {"": "collapse/token_similarity_last"}),
    ("replaceable blocks", "share of blocks", {"": "collapse/replaceable_ratio"}),
    ("map swap", "mean rise of the loss", {"": "collapse/map_swap"}),
    (
        "attention branch",
        "length, as a share of the token's",
        {"mean of the blocks": "collapse/branch_share", "least block": "collapse/branch_share_least"},
    ),
]
CAPTIONS = {
    "curves": f"A curve of more than {POINTS} points is drawn as means of neighbours.",
    "collapse": "In this project's study, of all measures of collapse the cosine of the tokens early in a "
    "training told most about the accuracy at its end (lower was better); the training loss told more. "
    "A block is replaceable if the loss hardly rises with the maps of the block before. "
    "docs/collapse.md says what each measure can tell.",
    "speed": "Of all ranks together; the norm is taken before clipping.",
}


def write_page(job: Job, said: Sequence[str], notable: dict[str, Any]) -> Path:
    """Write report.html and its figures, curves.png first of all, into the run's folder. Returns the page.

    Args:
        said: lines on model, data and batches.
        notable: the keys that tell the run from one with the defaults, and their values.

    Raises OutputError where they can't be written.
    """
    folder, state = job.folder.path, job.run.state
    curves = _curves(folder / "metrics.jsonl")
    figures = {}
    for name, panels in {"curves": TRAINING, "collapse": COLLAPSE, "speed": SPEED}.items():
        if (drawn := _drawn(panels, curves)) is not None:
            figures[name] = draw_lines(drawn, CAPTIONS[name])
    images = []
    job.folder.check_held()  # drawing takes a second, in which another run may begin under this name
    for name, figure in figures.items():
        file = save(figure, folder, name, kind="png")
        images.append((name, inline(file, f"curves of the run: {name}")))
    starts = read_json(folder / "environment.json")
    page = render(
        "deepvit_train.commands",
        "train_page.html.j2",
        name=job.run.config.name,
        outcome=_outcome(job),
        best=phrase_best(state.best, job.run.config.trainer.select_by) if state.best else None,
        last=phrase(state.metrics, job.labels.present),
        said=said,
        images=images,
        table=_table(job, curves, starts),
        notable={key: json.dumps(value) for key, value in sorted(notable.items())},
        starts=starts,
        bad_files=state.bad_files[:BAD_FILES],
        bad_count=len(state.bad_files),
    )
    job.folder.check_held()
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _outcome(job: Job) -> str:
    """Say what became of the run: 'Top-1 1.000 of 47 validation images at step 330 (best: step 77)'."""
    state = job.run.state
    weights, told = ("val", "") if state.ema is None else ("val_ema", " with averaged weights")
    images = amount(int(state.metrics.get(COUNTS[0], len(job.val))), "validation image")
    best = f" (best: step {state.best['step']:.0f})" if state.best else ""
    return f"Top-1 {state.metrics[f'{weights}/top1']:.3f} of {images}{told} at step {state.step}{best}"


def _curves(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Read every curve of metrics.jsonl: its steps and values."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, line in read_json_lines(file):
        if not isinstance(line, dict) or not isinstance(step := line.get("step"), int):
            continue
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((step, value))
    return curves


def _drawn(panels: Panels, curves: dict[str, list[tuple[int, float]]]) -> list[Panel] | None:
    """Return the panels that have curves; None if no panel has one."""
    found, colours = [], {"": 0}
    for title, axis, names in panels:
        lines = [
            Line(
                label,
                *zip(*_thinned(curves[name]), strict=True),
                colour=colours.setdefault(label, len(colours) - 1),
            )
            for label, name in names.items()
            if name in curves
        ]
        if lines:
            found.append(Panel(title, "step", axis, lines))
    return found or None


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return means of so many neighbours that at most POINTS points are left."""
    together = -(-len(points) // POINTS)
    groups = [points[start : start + together] for start in range(0, len(points), together)]
    return [(fmean(step for step, _ in group), fmean(value for _, value in group)) for group in groups]


def _table(
    job: Job, curves: dict[str, list[tuple[int, float]]], starts: Sequence[dict[str, Any]]
) -> Iterable[tuple[str, str]]:
    """Yield what a reader looks for first: name and text."""
    yield "run folder", str(job.folder.path)
    if job.run.state.best:
        yield "best checkpoint", str(job.folder.checkpoints / "best")
    rates = [value for _, value in curves.get("train/images_per_s", [])]
    if rates:
        yield "images a second", f"{median(rates):,.0f} (median of {amount(len(rates), 'line')})"
    waits = [value for _, value in curves.get("train/data_wait", [])]
    if waits:
        yield "waiting for data", f"{fmean(waits):.0%} of the time"
    memory = [value for _, value in curves.get("train/memory_mib", [])]
    if memory:
        yield "memory", f"{max(memory):,.0f} MiB at most"
    last = starts[-1]
    yield "machine", f"{last.get('gpu') or last['processor']}, {amount(last['world_size'], 'rank')}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in last["packages"].items())
    yield "code", f"deepvit-train {last['deepvit-train']}, git {last['git'] or 'unknown'}"
