"""What deepvit-eval found: as JSON, as a table, and in a file whose name says what was evaluated."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table
from timm.data import ImageNetInfo

from deepvit_train.atomic import RefusedError, write_text
from deepvit_train.config.data import DataConfig, absolute
from deepvit_train.config.evaluate import EvalConfig
from deepvit_train.config.preset import plain_from
from deepvit_train.config.recipe import Precision
from deepvit_train.console import amount, console, print_report
from deepvit_train.data.label import Labels
from deepvit_train.error import OutputError
from deepvit_train.evaluation.accuracy import EvalResult, top5_tells
from deepvit_train.evaluation.loaded import LoadedModel

WORST_CLASSES = 5  # shown in the table; the JSON file has all


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and what it was of.

    Args:
        loaded: the model, at the size that was evaluated.
        own_size: the image size that its file says, pixels.
        data: the data that was read.
        labels: which output of the model each of its classes is.
        total: how many images the split has.
    """

    loaded: LoadedModel
    own_size: int
    config: EvalConfig
    data: DataConfig
    labels: Labels
    total: int
    result: EvalResult

    @property
    def partial(self) -> bool:
        """Whether images were left out."""
        return self.result.images < self.total

    def file(self) -> Path:
        """Return the file for the result, beside the checkpoint.

        The weights' and the split's names are enough for the run's own data at its own size in fp32.
        Everything else that changes the result adds a part to the name.
        """
        loaded, config = self.loaded, self.config
        size = loaded.architecture.model.image_size
        parts = [loaded.weights, slug(self.data.evaluated)]
        if not _is_own(self.data, loaded):
            parts.append(f"{self.data.name}-{_short(Path(self.root or '').name)}-{_digest(self.root or '')}")
            if self.data.val_share is not None:
                parts.append(f"val_share{self.data.val_share:g}{_group_part(self.data.group_by)}")
        if size != self.own_size:
            parts.append(f"{size}px")
        elif config.calibrate_images is not None:
            parts.append(f"calibrated{config.calibrate_images}")
        if config.precision != Precision.fp32:
            parts.append(str(config.precision))
        said = {"preset": config.preset} if config.preset else {}
        parts += [f"{name}-{slug(str(value))}" for name, value in (said | config.said()).items()]
        if self.partial:
            parts.append(f"partial{self.result.images}")
        return loaded.found.beside(f"{'.'.join(parts)}.json")

    @property
    def root(self) -> str | None:
        """The folder of the data; None for the digits in the cache folder."""
        return absolute(self.data.root)

    def report(self) -> dict[str, Any]:
        """Return what is printed as the last line."""
        loaded, result = self.loaded, self.result
        report = {
            "checkpoint": str(loaded.found.file),
            "weights": loaded.weights,
            "data": str(self.data.name),
            "root": self.root,
            "split": self.data.evaluated,
            **self._split_keys(),
            "image_size": loaded.architecture.model.image_size,
            "preprocessing": preprocessing_of(loaded),
            "precision": str(self.config.precision),
            "top1": result.top1,
            "mean_class": result.mean_class,
            "top5": result.top5,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "images": result.images,
            "partial": self.partial,
            "of": self.total,
            "labels": self.labels.summary(),
            "images_per_s": round(result.images_per_s, 1),
        }
        return report | ({"not_finite": result.not_finite} if result.not_finite else {})

    def _split_keys(self) -> dict[str, Any]:
        """What made train and val of one folder; nothing where they are folders."""
        if self.data.val_share is None:
            return {}
        return {"val_share": self.data.val_share, "group_by": self.data.group_by}

    def tell(self, report: dict[str, Any], write_page: Callable[[], Path] | None = None) -> None:
        """Write the file and the page, print the table, and the report as the last line.

        A folder that can't be written costs what lies in it alone. Raises RefusedError at the end where a
        link or another thing lies in the place of a file.

        Args:
            write_page: writes the page with figures, and returns it.
        """
        result, absent = self.result, set(self.labels.absent)
        every = zip(result.class_accuracy, self.labels.names, result.class_images, strict=True)
        known = [each for place, each in enumerate(every) if place not in absent]
        seen = sorted((accuracy, name, images) for accuracy, name, images in known if accuracy is not None)
        by_class = {
            name: {"name": readable(name), "top1": accuracy, "images": images}
            for accuracy, name, images in known
        }
        refused: list[RefusedError] = []

        def write(kind: str, make: Callable[[], Path]) -> str:
            try:
                return f"{kind}: {make()}"
            except OutputError as error:
                refused.extend([error] if isinstance(error, RefusedError) else [])
                return f"not written: {error}"

        def write_file() -> Path:
            write_text(self.file(), json.dumps({**report, "classes": by_class}, indent=1) + "\n")
            return self.file()

        written = [write("written", write_file), *([write("read", write_page)] if write_page else [])]
        console.print(_table(self, seen))
        if unseen := len(known) - len(seen):
            console.print(f"classes without an image: {unseen}; nothing is known of them")
        if result.not_finite:
            console.print(
                f"warning: outputs for {amount(result.not_finite, 'image')} are NaN or infinite; they count "
                "as wrong"
            )
        for line in written:
            console.print(line)
        print_report(report)
        if refused:
            raise refused[0]


def preprocessing_of(loaded: LoadedModel) -> dict[str, Any]:
    """Return how images reach the model, with the names of those values that nobody said."""
    values = plain_from(loaded.architecture.model)
    names = ("image_size", "mean", "std", "crop_pct", "interpolation")
    return {name: values[name] for name in names} | {"assumed": loaded.assumed}


def _table(evaluated: Evaluated, per_class: list[tuple[float, str, int]]) -> Table:
    result = evaluated.result
    of = f" of {evaluated.total}, so partial" if evaluated.partial else ""
    title = f"{evaluated.data.evaluated}: {amount(result.images, 'image')}{of}"
    table = Table("class", "top-1", "images", title=title)
    for accuracy, name, images in per_class[:WORST_CLASSES]:
        table.add_row(readable(name), f"{accuracy:.4f}", str(images))
    if len(per_class) > WORST_CLASSES:
        table.add_row(f"... {len(per_class) - WORST_CLASSES} more, better ones", "", "")
    table.add_section()
    table.add_row("top-1", f"{result.top1:.4f}", f"{result.images}{' (partial)' if of else ''}")
    if top5_tells(evaluated.labels.present):
        table.add_row("top-5", f"{result.top5:.4f}", "")
    table.add_row("loss", f"{result.loss:.4f}", "")
    if evaluated.labels.absent:
        outputs = len(evaluated.labels.names)
        table.add_row("outputs", f"{outputs - len(evaluated.labels.absent)} of {outputs}", "")
    table.add_row("images/s", f"{result.images_per_s:.0f}", "")
    return table


def _is_own(data: DataConfig, loaded: LoadedModel) -> bool:
    """Whether this is the data set that the model's own run read."""
    return data.name == loaded.description.data and absolute(data.root) == loaded.found.data_path("data_root")


def _group_part(group_by: str | None) -> str:
    return "" if group_by is None else f"-{_digest(group_by)}"


def slug(text: str) -> str:
    """Return a text as a part of a file's name. No two values of a key get the same part.

    A list of numbers is told by them: '[0.5, 0.5]' becomes '0.5-0.5'. Where more is lost, a digest is added.
    """
    numbers = re.fullmatch(r"\[([\d., ]+)\]", text)
    whole = text if numbers is None else numbers[1].replace(", ", "-")
    short = _short(text)
    return short if short == whole else f"{short}-{_digest(text)}"


def _short(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[:40]


def _digest(text: str) -> str:
    """Tell folders of one name apart."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]


@cache
def _imagenet() -> ImageNetInfo:
    return ImageNetInfo("imagenet22k")


def readable(class_name: str) -> str:
    """Return the name of a class folder. For a WordNet id of ImageNet, the word for it follows."""
    if not re.fullmatch(r"n\d{8}", class_name):
        return class_name
    try:
        return f"{class_name} ({_imagenet().label_name_to_description(class_name)})"
    except KeyError:
        return class_name
