"""Write the report of an evaluation: a page of one file, figures, numbers, and a row for each image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deepvit_train.atomic import make_folder, write_text
from deepvit_train.commands.evaluate_figure import (
    OVERVIEW,
    READABLE,
    draw_classes,
    draw_confusion,
    draw_losses,
    draw_overview,
    draw_reliability,
    most_telling,
)
from deepvit_train.commands.evaluate_gallery import galleries
from deepvit_train.commands.evaluate_result import Evaluated, readable
from deepvit_train.console import amount
from deepvit_train.data.index import ImageIndex
from deepvit_train.error import OutputError
from deepvit_train.evaluation.accuracy import top5_tells
from deepvit_train.evaluation.interval import Estimate
from deepvit_train.evaluation.metric import (
    TEMPERATURES,
    ClassFigures,
    Confusion,
    Temperature,
    by_class,
    fit_temperature,
    most_confused,
    overall,
    reliability,
)
from deepvit_train.evaluation.prediction import Predictions
from deepvit_train.evaluation.row import rows_of, write_rows
from deepvit_train.report.figure import save
from deepvit_train.report.page import inline, render

FILE = "evaluation.json"
CONFUSED = 200  # pairs of classes in the JSON file
SHOWN_PAIRS = 20  # of them on the page
FEW = 100  # images; of fewer a mistake is more than a hundredth
NAMES = {
    "accuracy": "accuracy (top-1)",
    "mean_class_accuracy": "mean-class accuracy",
    "macro_f1": "F1, mean over classes",
    "loss": "loss",
    "ece": "calibration error (ECE)",
}


@dataclass(frozen=True)
class EvaluationReport:
    """The predictions of an evaluation, and what they were of.

    Args:
        evaluated: the evaluation.
        index: the split, with the model's numbers for its classes.
        predictions: of its images.
    """

    evaluated: Evaluated
    index: ImageIndex
    predictions: Predictions

    @property
    def names(self) -> list[str]:
        """The names of the model's outputs."""
        return self.evaluated.labels.names

    @property
    def present(self) -> list[int]:
        """The numbers of the classes that are evaluated."""
        absent = set(self.evaluated.labels.absent)
        return [number for number in range(len(self.names)) if number not in absent]

    def write(self) -> Path:
        """Write the folder of the report, and return its page. Raises OutputError."""
        folder = _folder(self.evaluated)
        figures = by_class(self.predictions, self.present)
        estimates = overall(self.predictions, len(self.names))
        temperature = fit_temperature(self.predictions)
        confused = most_confused(self.predictions, len(self.names), CONFUSED)
        write_rows(rows_of(self.predictions, self.index, self.names), folder)
        content = self._content(figures, estimates, temperature, confused)
        write_text(folder / FILE, json.dumps(content, indent=1) + "\n")
        drawn = {
            name: save(figure, folder, name, "png")
            for name, figure in self._figures(figures, temperature, confused).items()
        }
        page = render(
            "deepvit_train.commands",
            "evaluate_report.html.j2",
            content=content,
            estimates=[(NAMES[name], self._phrase(estimate)) for name, estimate in estimates.items()],
            names_top5=top5_tells(self.evaluated.labels.present),
            findings=self._findings(temperature),
            figures={name: inline(file, name.replace("_", " ")) for name, file in drawn.items()},
            classes=self._class_rows(figures),
            pairs=[self._pair(pair) for pair in confused[:SHOWN_PAIRS]],
            galleries=galleries(self.evaluated, self.index, self.predictions, folder),
        )
        write_text(folder / "report.html", page)
        return folder / "report.html"

    def _content(
        self,
        figures: Sequence[ClassFigures],
        estimates: dict[str, Estimate],
        temperature: Temperature | None,
        confused: Sequence[Confusion],
    ) -> dict[str, Any]:
        """Return the content of evaluation.json."""
        seen, asked = self.predictions, self.predictions.answered
        return {
            **self.evaluated.report(),
            "folder": str(self.index.folder),
            "index_digest": self.index.digest,
            "parameters": sum(each.numel() for each in self.evaluated.loaded.model.parameters()),
            "estimates": {name: estimate.plain() for name, estimate in estimates.items()},
            "intervals": "95 %: Wilson's for accuracy, a percentile bootstrap over images for the others",
            "reliability": asdict(reliability(seen.probability[asked], seen.right[asked])),
            "temperature": None if temperature is None else asdict(temperature),
            "classes": {
                self.names[number]: asdict(found) for number, found in zip(self.present, figures, strict=True)
            },
            "confused": [
                {**asdict(pair), "true": self.names[pair.true], "told": self.names[pair.told]}
                for pair in confused
            ],
        }

    def _figures(
        self,
        figures: Sequence[ClassFigures],
        temperature: Temperature | None,
        confused: Sequence[Confusion],
    ) -> dict[str, Figure]:
        found = {
            "reliability": draw_reliability(self.predictions, temperature),
            "losses": draw_losses(self.predictions),
            "classes": draw_classes([self.names[number] for number in self.present], figures),
        }
        named = most_telling(confused, self.present)
        if len(named) > 1:  # one class is confused with no other
            found["confusion"] = draw_confusion(self.predictions, self.names, named)
        if READABLE < len(self.present) <= OVERVIEW:
            found["confusion_overview"] = draw_overview(self.predictions, self.present)
        return found

    def _phrase(self, estimate: Estimate) -> str:
        if estimate.low is not None and estimate.high is not None:
            return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
        why = f" (no interval: no mistake in {amount(len(self.predictions), 'image')})"
        return f"{estimate.value:.4f}{why if self.predictions.right.all() else ''}"

    def _easy(self) -> list[str]:
        """Say what may make a small or perfect result worth little."""
        seen, perfect = len(self.predictions), bool(self.predictions.right.all())
        if not perfect and (seen >= FEW or self.evaluated.partial):
            return []
        found = f"{'No mistake in' if perfect else 'These are only'} {amount(seen, 'image')}"
        return [
            f"{found}. Near copies of training images, such as frames of one film, make an evaluation easy. "
            "Keep such images together by data.group_by (docs/data.md), and train anew."
        ]

    def _findings(self, temperature: Temperature | None) -> list[str]:
        """Say what the reader should know before the figures."""
        seen = self.predictions
        lines = []
        if self.evaluated.partial:
            lines.append(
                f"Partial: {amount(len(seen), 'image')} of {self.evaluated.total}, spread over the classes."
            )
        if self.evaluated.labels.absent:
            lines.append(f"{self.evaluated.labels.restriction.capitalize()}.")
        if missing := len(self.present) - len(np.unique(seen.targets)):
            lines.append(f"{amount(missing, 'class', 'classes')} without an image; nothing is known of them.")
        if unanswered := int((~seen.answered).sum()):
            lines.append(
                f"Outputs for {amount(unanswered, 'image')} are NaN or infinite. They count as wrong, and "
                "calibration leaves them out."
            )
        lines += self._easy()
        if temperature is not None:
            lines.append(_told_of(temperature))
        return lines

    def _class_rows(self, figures: Sequence[ClassFigures]) -> list[list[str]]:
        """Return the rows of the table of classes, the worst first."""
        pairs = sorted(
            zip(self.present, figures, strict=True),
            key=lambda pair: (pair[1].f1 is None, pair[1].f1 or 0.0, self.names[pair[0]]),
        )
        return [
            [
                readable(self.names[number]),
                *(
                    "" if value is None else f"{value:.3f}"
                    for value in (each.precision, each.recall, each.f1)
                ),
                str(each.support),
            ]
            for number, each in pairs
        ]

    def _pair(self, pair: Confusion) -> list[str]:
        true, told = readable(self.names[pair.true]), readable(self.names[pair.told])
        return [true, told, str(pair.images), f"{100 * pair.share:.1f} %"]


def _folder(evaluated: Evaluated) -> Path:
    """Make the folder of a report: RUN/evaluation/NAME, or beside a weights file that is of no run."""
    stem = evaluated.file().with_suffix("")
    run = evaluated.loaded.found.run
    place, names = (stem.parent, [stem.name]) if run is None else (run, ["evaluation", stem.name])
    try:
        return make_folder(place, *names)
    except OSError as error:
        raise OutputError(f"{place.joinpath(*names)}: can't be written ({error.strerror})") from None


def _told_of(temperature: Temperature) -> str:
    """Say what a temperature does."""
    (loss, better), (ece, after) = temperature.loss, temperature.ece
    kind = "less sure than it should be" if temperature.value < 1 else "surer than it should be"
    at_end = not 1.01 * TEMPERATURES[0] < temperature.value < 0.99 * TEMPERATURES[1]
    return (
        f"The model is {kind}: a temperature of {temperature.value:.3g} was fitted on one half of the images "
        f"({temperature.fitted_on:,}) and judged on the other ({temperature.judged_on:,}), where the loss "
        f"goes from {loss:.4f} to {better:.4f} and the calibration error from {ece:.4f} to {after:.4f}."
        f"{' It is an end of the range that was searched.' * at_end}"
    )
