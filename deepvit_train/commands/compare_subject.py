"""Load what deepvit-compare compares: an evaluation's rows and numbers, and the run that it is of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from deepvit_train.commands import evaluate
from deepvit_train.commands.evaluate_result import slug
from deepvit_train.config.compare import CompareConfig
from deepvit_train.config.compose import compose_command
from deepvit_train.config.data import VAL
from deepvit_train.console import amount, console
from deepvit_train.error import CheckpointError, DataError
from deepvit_train.evaluation.row import FILE as ROWS
from deepvit_train.evaluation.row import Row, read_rows
from deepvit_train.reading import read_json, read_json_lines, read_yaml
from deepvit_train.run import schema
from deepvit_train.run.change import GROWING_KEYS, flatten, unchanging
from deepvit_train.run.found import find
from deepvit_train.run.link import FOLDER as CHECKPOINTS
from deepvit_train.run.link import NAME

NUMBERS = "evaluation.json"
ESTIMATE = {"value": schema.NUMBER | schema.NULL, "low": schema.NUMBER | schema.NULL}
CONTENT = {
    "weights": schema.TEXT,
    "data": schema.TEXT,
    "root": schema.TEXT | schema.NULL,
    "split": schema.TEXT,
    "image_size": schema.COUNT,
    "precision": schema.TEXT,
    "preprocessing": schema.SETTING,
    "images": schema.COUNT,
    "of": schema.COUNT,
    "images_per_s": schema.NUMBER,
    "folder": schema.TEXT,
    "index_digest": schema.TEXT,
    "parameters": schema.COUNT,
    "estimates": {"accuracy": ESTIMATE},
}
PLACES = ("name", "run_dir", "resume")  # keys that say where a run lies


@dataclass(frozen=True)
class Subject:
    """One of the models that are compared.

    Args:
        label: what it is called in tables.
        folder: of its evaluation.
        run: the folder of its run, if it is of one.
        content: of evaluation.json.
        rows: what it says of each image, by path.
        config: its run's configuration with dotted keys, if it is of one.
        checkpoint: which checkpoint of its run it is of, 'best and last, step 420'; '' if it is of none.
        metrics: the lines of its run's metrics.jsonl.
    """

    label: str
    folder: Path
    run: Path | None
    content: dict[str, Any]
    rows: dict[str, Row]
    config: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    checkpoint: str = ""

    @property
    def hits(self) -> int:
        """How many images it tells right."""
        return sum(row.right for row in self.rows.values())

    @property
    def accuracy(self) -> float:
        """The share of images that it tells right."""
        return self.hits / len(self.rows)

    @property
    def settings(self) -> dict[str, Any] | None:
        """What its accuracy rests on beside its seed, with dotted keys; None where that is not known."""
        if self.config is None:
            return None
        kept = unchanging(self.config) | {key: self.config.get(key) for key in GROWING_KEYS}
        kept.pop("seed", None)
        return kept | {key: self.content[key] for key in ("weights", "image_size", "precision")}

    @property
    def group(self) -> str | None:
        """What it shares with runs that differ from it in their seed alone; None where that is not known."""
        settings = self.settings
        return None if settings is None else json.dumps(settings, sort_keys=True, default=str)

    @property
    def seed(self) -> Any:
        """The seed of its run, if it is of one."""
        return (self.config or {}).get("seed")

    @property
    def is_chosen(self) -> bool:
        """Whether its checkpoint was chosen on the images that are compared."""
        own = (self.config or {}).get("data.split") or "val"  # runs of old versions do not say it
        return self.checkpoint.startswith("best") and self.content["split"] == own

    def curve(self, *names: str) -> tuple[list[int], list[float]]:
        """Return steps and values of the first of these metrics that the run logged."""
        for name in names:
            points = [(line["step"], line[name]) for line in self.metrics if _is_number(line, name)]
            if points:
                return [step for step, _ in points], [value for _, value in points]
        return [], []

    def cost(self) -> dict[str, float | None]:
        """Return parameters, speed and memory; None for what the run did not log.

        The time of the training is that of its images at its median speed: pauses and evaluations do not
        count.
        """
        _, speeds = self.curve("train/images_per_s")
        _, memory = self.curve("train/memory_mib")
        steps = max((line["step"] for line in self.metrics), default=0)
        batch = (self.config or {}).get("trainer.batch_size")
        seconds = steps * batch / median(speeds) if speeds and isinstance(batch, int) else None
        return {
            "parameters": self.content["parameters"],
            "train_seconds": seconds,
            "train_images_per_s": median(speeds) if speeds else None,
            "train_memory_mib": max(memory) if memory else None,
            "eval_images_per_s": self.content["images_per_s"],
        }


def load_subjects(config: CompareConfig) -> list[Subject]:
    """Load what is compared; a run without an evaluation is evaluated first.

    Raises CheckpointError where there is none to be had, DataError where two are not of the same images.
    """
    subjects = [_load(_evaluation_of(path, config)) for path in config.runs]
    folders = [subject.folder.resolve() for subject in subjects]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise DataError(f"runs: {config.runs[place]} and {config.runs[folders.index(folder)]} are one")
    labels = [subject.label for subject in subjects]
    for longer in (lambda one: f"{one.label}/{one.folder.name}", lambda one: str(one.folder)):
        if len(set(labels)) < len(labels):
            subjects = [replace(one, label=longer(one)) for one in subjects]
            labels = [subject.label for subject in subjects]
    for other in subjects[1:]:
        check_same_images(subjects[0], other)
    return subjects


def check_same_images(first: Subject, other: Subject) -> None:
    """Raise DataError, with the reason, if two evaluations are not of the same images of the same classes."""
    if first.rows.keys() != other.rows.keys():
        own, others = first.rows.keys() - other.rows.keys(), other.rows.keys() - first.rows.keys()
        example, of = (min(own), first) if own else (min(others), other)
        raise DataError(
            f"{first.label} and {other.label} are not of the same images: {_told(first)}; {_told(other)}; "
            f"{example} is in {of.label} alone"
        )
    for path, row in first.rows.items():
        if row.label != other.rows[path].label:
            raise DataError(
                f"{first.label} and {other.label} are not of the same classes: {path} is {row.label!a} for "
                f"one and {other.rows[path].label!a} for the other"
            )


def changed_keys(subjects: list[Subject]) -> dict[str, list[Any]]:
    """Return the keys in which configurations differ, each with the value of every subject."""
    known = [subject.config or {} for subject in subjects]
    keys = sorted(set().union(*known) - set(PLACES))
    values = {key: [config.get(key) for config in known] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _told(subject: Subject) -> str:
    content = subject.content
    of = f" of {content['of']:,}" if content["images"] < content["of"] else ""
    digest = f", digest {content['index_digest'][:8]}" if content["index_digest"] else ""
    return f"{amount(content['images'], 'image')}{of} in {content['folder']}{digest}"


def _evaluation_of(path: str, config: CompareConfig) -> Path:
    """Return the folder of an evaluation: the one that was given, or that of a run's checkpoint."""
    given = Path(path).expanduser()
    if (given / NUMBERS).is_file():
        return given
    found = find(path, key="runs")
    if found.run is None or found.folder is None:
        raise CheckpointError(
            f"runs: {path} is of no run; evaluate it with deepvit-eval, and give the folder of its report"
        )
    split = slug(found.split() or VAL)
    folder = found.run / "evaluation" / f"{found.folder.resolve().name}.{found.kind}.{split}"
    if not (folder / NUMBERS).is_file():
        console.print(f"{path}: not evaluated yet")
        typed = [f"batch_size={config.batch_size}", f"device={config.device.value}"]
        threads = [] if config.threads is None else [f"threads={config.threads}"]
        evaluate.run(compose_command("eval", [path, *typed, *threads]))
    return folder


def _load(folder: Path) -> Subject:
    try:
        content = schema.fitting(read_json(folder / NUMBERS), CONTENT, folder / NUMBERS)
    except OSError as error:
        raise CheckpointError(f"{folder / NUMBERS}: can't be read ({error.strerror})") from None
    rows = read_rows(folder / ROWS)
    by_path = {row.path: row for row in rows}
    if not rows or len(by_path) < len(rows):
        raise CheckpointError(f"{folder / ROWS}: damaged ({'a path twice' if rows else 'no row'})")
    above = folder.resolve().parent.parent
    run = (
        above if (above / "config.yaml").is_file() and folder.resolve().parent.name == "evaluation" else None
    )
    config = None
    if run is not None:
        config = flatten(schema.fitting(read_yaml(run / "config.yaml"), schema.CONFIG, run / "config.yaml"))
    label = folder.name if run is None else run.name
    checkpoint = "" if run is None else _checkpoint_of(folder, run)
    return Subject(label, folder, run, content, by_path, config, list(_metrics(run)), checkpoint)


def _checkpoint_of(folder: Path, run: Path) -> str:
    """Say which checkpoint of a run an evaluation is of, as its folder's name and the run's links tell."""
    name = folder.resolve().name.split(".")[0]
    links = {role: run / CHECKPOINTS / role for role in ("best", "last")}
    roles = [role for role, link in links.items() if name in (role, link.resolve().name)]
    step = NAME.fullmatch(name)
    told = [" and ".join(roles)] if roles else []
    return ", ".join([*told, f"step {int(step[1])}"] if step else told)


def _metrics(run: Path | None) -> Iterable[dict[str, Any]]:
    """Give the lines of a run's metrics that have a step. A run that lost the file has none."""
    try:
        lines = [] if run is None else [content for _, content in read_json_lines(run / "metrics.jsonl")]
    except OSError:
        lines = []
    return [line for line in lines if isinstance(line, dict) and schema.COUNT.fits(line.get("step"))]


def _is_number(line: dict[str, Any], name: str) -> bool:
    return schema.FINITE.fits(line.get(name))
