"""Choose and write the images that the report of an evaluation shows, as the model saw them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from PIL import Image

from deepvit_train.atomic import make_folder, remove, replacing
from deepvit_train.commands.evaluate_result import Evaluated, readable
from deepvit_train.console import one_line
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.loaders import limits
from deepvit_train.data.pixels import seen_pixels
from deepvit_train.error import OutputError
from deepvit_train.evaluation.metric import surest_mistakes, worst_images
from deepvit_train.evaluation.prediction import NO_ANSWER, Predictions
from deepvit_train.report.page import inline

SHOWN_IMAGES = 12  # of each kind
LARGEST_SIDE = 160  # pixels


@dataclass(frozen=True)
class Picture:
    """An image on a page: its file, and what is said below it."""

    file: Path
    lines: list[str]

    @property
    def inlined(self) -> Markup:
        """The image as part of a page."""
        return inline(self.file, self.lines[0])


@dataclass(frozen=True)
class Gallery:
    """Images of one kind: a title, a text, and the images."""

    title: str
    text: str
    pictures: list[Picture]


def galleries(
    evaluated: Evaluated, index: ImageIndex, predictions: Predictions, folder: Path
) -> list[Gallery]:
    """Write the images to FOLDER/images, and return them. Raises OutputError.

    An image that can't be read any more is left out, and so is a kind of which there is none.
    """
    kinds = [
        (
            "mistake",
            "Which mistakes is the model surest of?",
            "Wrong answers, the largest probability first. Wrong labels are often here.",
            surest_mistakes(predictions, SHOWN_IMAGES),
        ),
        (
            "worst",
            "Which images have the largest loss?",
            "Their true class got the least probability.",
            worst_images(predictions, SHOWN_IMAGES),
        ),
    ]
    images = emptied(folder, "images")
    found = []
    for name, title, text, places in kinds:
        pictures = []
        for rank, place in enumerate(places):
            number = int(predictions.images[place])
            preprocessing = evaluated.loaded.architecture.model.preprocessing
            pixels = seen_pixels(index, number, preprocessing, limits(evaluated.data))
            if pixels is not None:
                file = save_picture(pixels, images / f"{name}_{rank + 1:02}.png")
                pictures.append(Picture(file, _told(evaluated, index, predictions, place)))
        if pictures:
            found.append(Gallery(title, text, pictures))
    return found


def _told(evaluated: Evaluated, index: ImageIndex, predictions: Predictions, place: int) -> list[str]:
    names, told = evaluated.labels.names, int(predictions.predicted[place])
    answer = "no answer" if told == NO_ANSWER else readable(names[told])
    return [
        f"true: {readable(names[predictions.targets[place]])}",
        f"answer: {answer} ({predictions.probability[place]:.3f})",
        f"loss {predictions.loss[place]:.2f}",
        one_line(index.path(int(predictions.images[place]))[len(f"{index.folder}/") :]),
    ]


def save_picture(pixels: np.ndarray, file: Path) -> Path:
    """Write pixels, (height, width, 3) uint8, as a PNG of at most LARGEST_SIDE pixels a side."""
    image, drawn = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    image.save(drawn, "PNG")
    with replacing(file, flush=False) as opened:
        opened.write(drawn.getvalue())
    return file


def emptied(folder: Path, name: str) -> Path:
    """Make a folder for images without those of an earlier report. Raises OutputError."""
    try:
        made = make_folder(folder, name)
        for old in made.glob("*.png"):
            remove(old)
    except OSError as error:
        raise OutputError(f"{folder / name}: can't be written ({error.strerror})") from None
    return made
