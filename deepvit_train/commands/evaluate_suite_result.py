"""What a suite found: a file that each result goes into as soon as it is known, and one table of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from deepvit_train.atomic import write_text
from deepvit_train.commands.evaluate_result import preprocessing_of
from deepvit_train.config.evaluate import EvalConfig
from deepvit_train.config.recipe import Precision
from deepvit_train.config.suite import SuiteName
from deepvit_train.console import console, print_report
from deepvit_train.data.imagenet import CLASSES
from deepvit_train.error import CheckpointError
from deepvit_train.evaluation.accuracy import top5_tells
from deepvit_train.evaluation.loaded import LoadedModel
from deepvit_train.evaluation.robustness import corruption_error, mean_corruption_error
from deepvit_train.reading import read_json
from deepvit_train.run import schema
from deepvit_train.run.schema import fitting

Results = dict[str, dict[str, Any]]

TITLES = {
    "val": "validation",
    "real": "ReaL",
    "v2": "V2",
    "a": "A",
    "r": "R",
    "sketch": "Sketch",
    "c": "C",
    "clean": "clean",
}
SHAPE = {
    "model": {schema.ANY: schema.SETTING},
    "sets": {
        schema.ANY: {
            "top1": schema.FINITE,
            "top5": schema.FINITE,
            "images": schema.COUNT,
            "of": schema.SETTING,
        }
    },
}


@dataclass(frozen=True)
class SuiteFile:
    """The results of a suite, beside the checkpoint.

    Args:
        model: what the results are about, besides the sets: weights, size, precision.
    """

    file: Path
    model: dict[str, Any]

    @classmethod
    def of(cls, loaded: LoadedModel, config: EvalConfig, own_size: int) -> SuiteFile:
        """Return the file of a model and a suite. What else changes a result adds a part to its name."""
        size = loaded.architecture.model.image_size
        parts = [loaded.weights, f"suite-{config.suite.name}"]
        parts += [f"{size}px"] if size != own_size else []
        parts += [f"calibrated{config.calibrate_images}"] if config.calibrate_images is not None else []
        parts += [str(config.precision)] if config.precision != Precision.fp32 else []
        if config.limit_batches is not None:
            parts.append(f"partial{config.limit_batches}x{config.batch_size}")
        with loaded.found.file.open("rb") as weights:
            digest = hashlib.file_digest(weights, "sha256").hexdigest()
        model = {
            "weights": loaded.weights,
            "sha256": digest,
            "preprocessing": preprocessing_of(loaded),
            "precision": str(config.precision),
            "said": config.said(),
            "preset": config.preset,
        }
        return cls(loaded.found.beside(f"{'.'.join(parts)}.json"), json.loads(json.dumps(model)))

    def read(self, say: Callable[[str], None]) -> Results:
        """Return the results so far. Those of another model, and what is no such file, are left alone."""
        try:
            found = fitting(read_json(self.file), SHAPE, self.file)
        except FileNotFoundError:
            return {}
        except (OSError, CheckpointError) as error:
            say(f"results so far can't be used ({error}); every set is evaluated")
            return {}
        if found["model"] != self.model:
            say(f"{self.file} is about other weights or another preprocessing; every set is evaluated anew")
            return {}
        return found["sets"]

    def write(self, results: Results) -> None:
        """Write the results. Raises OutputError."""
        write_text(self.file, json.dumps({"model": self.model, "sets": results}, indent=1) + "\n")


def tell(
    config: EvalConfig,
    loaded: LoadedModel,
    file: SuiteFile,
    results: Results,
    skipped: dict[str, str],
    shown: bool,
) -> dict[str, Any]:
    """Return the report; where it is shown, print the table, and the report as the last line."""
    by_corruption: dict[str, dict[int, float]] = {}
    for name, result in results.items():
        if "/" in name:
            *_, corruption, severity = name.split("/")
            by_corruption.setdefault(corruption, {})[int(severity)] = result["top1"]
    is_imagenet = config.suite.name == SuiteName.imagenet
    is_whole = is_imagenet and config.limit_batches is None and _has_all_classes(results)
    accuracies = {name: list(found.values()) for name, found in by_corruption.items()}
    report = {
        "checkpoint": str(loaded.found.file),
        "weights": loaded.weights,
        "suite": str(config.suite.name),
        "top1": {name: result["top1"] for name, result in results.items()},
        "mce": mean_corruption_error(accuracies) if is_whole else None,
        "left_out": skipped,
        "file": str(file.file),
    }
    if shown:
        table = _table(config, results)
        for corruption, found in by_corruption.items():
            error = corruption_error(corruption, list(found.values())) if is_whole else None
            table.add_row(*_corruption_row(corruption, found, is_imagenet, error))
        if by_corruption and is_imagenet:
            table.add_row("C, mCE", "", "", "", _mean_error(report["mce"]))
        for name, reason in skipped.items():
            table.add_row(TITLES.get(name, name), "left out", "", "", reason)
        console.print(table)
        console.print(f"written: {file.file}")
        print_report(report)
    return report


def _has_all_classes(results: Results) -> bool:
    """Return whether ImageNet-C was told apart in all of its classes, as AlexNet's figures were."""
    labels = [result.get("labels") or {} for name, result in results.items() if name.startswith("c/")]
    return all(each.get("outputs") == each.get("classes") == CLASSES for each in labels)


def _table(config: EvalConfig, results: Results) -> Table:
    """Return a table with a row for each set that is not corrupted."""
    partial = ", partial" if config.limit_batches is not None else ""
    table = Table("set", "top-1", "top-5", "images", "", title=f"suite {config.suite.name}{partial}")
    for name, result in results.items():
        if "/" not in name:
            top1, top5 = f"{result['top1']:.4f}", f"{result['top5']:.4f}"
            if not top5_tells((result.get("labels") or {}).get("classes", CLASSES)):
                top5 = ""
            table.add_row(TITLES.get(name, name), top1, top5, str(result["images"]), _note(result))
    return table


def _note(result: dict[str, Any]) -> str:
    notes = [f"{result['unlabelled']} without a label are left out"] if result.get("unlabelled") else []
    labels = result.get("labels") or {}
    if labels.get("restricted_to_present"):
        notes.append(f"{labels['classes']} of {labels['outputs']} outputs")
    notes += [f"outputs for {result['not_finite']} are not finite"] if result.get("not_finite") else []
    return "; ".join(notes)


def _corruption_row(
    corruption: str, found: dict[int, float], is_imagenet: bool, error: float | None
) -> tuple[str, ...]:
    """Return the row of a corruption: its mean, each severity, and its error if there is one."""
    mean = f"{sum(found.values()) / len(found):.4f}"
    severities = ", ".join(f"{severity}: {top1:.4f}" for severity, top1 in found.items())
    ended = "" if error is None else f"; CE {error:.1f}"
    return (f"C {corruption}" if is_imagenet else corruption, mean, "", "", f"{severities}{ended}")


def _mean_error(mce: float | None) -> str:
    if mce is None:
        return "not known: it needs all 15 corruptions in 5 severities, of all 1,000 classes"
    return f"{mce:.2f} (AlexNet: 100; lower is better)"
