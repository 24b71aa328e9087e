"""What a model says of each image as a file: a row an image, read back to be compared."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deepvit_train.atomic import replacing
from deepvit_train.console import one_line
from deepvit_train.data.index import ImageIndex
from deepvit_train.error import CheckpointError
from deepvit_train.evaluation.prediction import NO_ANSWER, Predictions
from deepvit_train.reading import read_bytes

FILE = "predictions.csv"
COLUMNS = ("path", "class", "prediction", "probability", "loss")
LARGEST = 1 << 30  # bytes of a file of rows; ten million images need less


@dataclass(frozen=True)
class Row:
    """What a model says of an image.

    Args:
        path: of the image inside of the split's folder.
        label: its class.
        prediction: the class that the model tells; '' if its outputs were NaN or infinite.
    """

    path: str
    label: str
    prediction: str
    probability: float
    loss: float

    @property
    def right(self) -> bool:
        """Whether the model told the class of the image."""
        return self.prediction == self.label


def rows_of(predictions: Predictions, index: ImageIndex, names: Sequence[str]) -> list[Row]:
    """Return a row for each image, in the order of the index.

    Args:
        names: of the model's outputs.
    """
    above = len(f"{index.folder}/")
    columns = (predictions.images, predictions.targets, predictions.predicted)
    numbers: Any = zip(*(each.tolist() for each in columns), strict=True)
    floats = zip(predictions.probability.tolist(), predictions.loss.tolist(), strict=True)
    rows = []
    for (image, target, told), (probability, loss) in zip(numbers, floats, strict=True):
        label, prediction = str(names[target]), "" if told == NO_ANSWER else str(names[told])
        rows.append(Row(one_line(index.path(image)[above:]), label, prediction, probability, loss))
    return rows


def write_rows(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write predictions.csv, and predictions.parquet if pyarrow is installed. Raises OutputError."""
    lines = [(row.path, row.label, row.prediction, row.probability, row.loss) for row in rows]
    with replacing(folder / FILE, flush=False) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        # Nine digits tell every number in single precision from the next.
        writer.writerows((*texts, f"{share:.9g}", f"{loss:.9g}") for *texts, share, loss in lines)
        text.detach()
    if find_spec("pyarrow") is None:
        return [folder / FILE]
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    other = folder / "predictions.parquet"
    table = arrow.table(dict(zip(COLUMNS, map(list, zip(*lines, strict=True)), strict=True)))
    with replacing(other, flush=False) as file:
        parquet.write_table(table, file)
    return [folder / FILE, other]


def read_rows(file: Path) -> list[Row]:
    """Return the rows of a file that `write_rows` wrote. Raises CheckpointError if they can't be used."""
    try:
        lines = csv.reader(io.StringIO(read_bytes(file, LARGEST).decode(), newline=""), strict=True)
        if tuple(next(lines, ())) != COLUMNS:
            raise ValueError(f"not the columns {', '.join(COLUMNS)}")
        return [_row(line) for line in lines]
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror})") from None
    except (ValueError, csv.Error) as error:
        raise CheckpointError(f"{file}: damaged ({error})") from None


def _row(line: list[str]) -> Row:
    if len(line) != len(COLUMNS):
        raise ValueError(f"a row of {len(line)} values")
    path, label, prediction, probability, loss = line
    return Row(path, label, prediction, float(probability), float(loss))
