"""What deepvit-predict writes of an image: a row of CSV, or a JSON object."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from deepvit_train.atomic import make_folder, replacing
from deepvit_train.config.predict import RowFormat
from deepvit_train.console import one_line
from deepvit_train.error import OutputError


@dataclass(frozen=True)
class RowWriter:
    """Writes rows. CSV begins with the names of its columns: file, class_1, probability_1, class_2, ...

    Args:
        stream: where to.
        format: csv or jsonl.
        classes: the names of the model's outputs.
        top: how many classes a row has.
    """

    stream: IO[str]
    format: RowFormat
    classes: list[str]
    top: int

    def begin(self) -> None:
        """Write what stands above the first row."""
        if self.format == RowFormat.csv:
            named = [f"{what}_{place + 1}" for place in range(self.top) for what in ("class", "probability")]
            self.stream.write(_csv_line(["file", *named]))

    def write(self, file: str, places: list[int], probabilities: list[float]) -> None:
        """Write the row of an image: numbers and probabilities of its classes, the likeliest first."""
        file, names = one_line(file), [self.classes[place] for place in places]
        shown = [float(f"{probability:.6g}") for probability in probabilities]
        if self.format == RowFormat.jsonl:
            row = {"file": file, "classes": names, "probabilities": shown}
            self.stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            pairs = zip(names, shown, strict=True)
            self.stream.write(_csv_line([file, *(part for pair in pairs for part in pair)]))


def _csv_line(fields: list[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(fields)
    return line.getvalue()


@contextmanager
def rows_into(out: Path | None, stdout: IO[str]) -> Iterator[IO[str]]:
    """Give the stream of the rows: a file that is there once it is whole, or stdout. Raises OutputError."""
    if out is None:
        yield stdout
        stdout.flush()
    else:
        try:
            make_folder(out.parent)
        except OSError as error:
            raise OutputError(f"out={out}: can't be written ({error.strerror})") from None
        with replacing(out) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
            yield text
            text.detach()


def save_features(features: list[Tensor], out: Path) -> None:
    """Write features, (B, D) of each batch, as one array (images, D) of float32. Raises OutputError."""
    with replacing(out) as file:
        np.save(file, torch.cat(features).numpy())
