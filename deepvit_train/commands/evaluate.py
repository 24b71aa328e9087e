"""`deepvit-eval` measures what a checkpoint gets right, on its own data or other data of the same classes."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import torch
from rich.table import Table
from timm.data import ImageNetInfo

from deepvit_train.atomic import write_text
from deepvit_train.config.data import DataConfig
from deepvit_train.config.evaluate import EvalConfig
from deepvit_train.console import console
from deepvit_train.data.index import open_split
from deepvit_train.data.label import Labels
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed import world as distributed
from deepvit_train.error import ConfigError, OutputError
from deepvit_train.evaluation.accuracy import EvalResult, evaluate
from deepvit_train.evaluation.calibration import reattention_norms, using
from deepvit_train.evaluation.loaded import LoadedModel, load, measure_statistics

WORST_CLASSES = 5  # shown in the table; the JSON file has all


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Prints a table, writes a JSON file beside the checkpoint, and prints a JSON object as the last line.
    """
    world = distributed.start(config.device.value, config.timeout_s)
    if config.threads:
        torch.set_num_threads(config.threads)
    say = console.print if world.is_main else lambda line: None

    # The checkpoint says what the model is and how its images are prepared; of a foreign file the user does.
    loaded = load(config.checkpoint, config.weights.value, config.preset, **config.said())
    if config.calibrate_images is not None:
        loaded = loaded.calibrating_on(config.calibrate_images)
    if config.image_size is not None:
        loaded = _at_size(loaded, config.image_size)
    model, preprocessing = loaded.model.to(world.device), loaded.architecture.model.preprocessing
    say(f"{loaded.found.file}: {loaded.weights} weights")

    # The data of the run, unless other data was given.
    data = loaded.data_for(config.data)
    index = open_split(data, data.split)
    index, labels = loaded.labelled(index, data)
    for line in labels.lines:
        say(line)

    # Calibrate if there are no statistics for these weights at this size, then evaluate.
    loaders, statistics = Loaders(preprocessing, data, world), loaded.statistics
    if loaded.needs_calibration:
        say(
            f"no calibrated statistics for these weights at {preprocessing.image_size} pixels: "
            f"calibrating on {loaded.description.calibrate_images} training images"
        )
        statistics = measure_statistics(loaded, loaders, config.batch_size, config.precision, say)
    batches = loaders.evaluation(index, config.batch_size, config.limit_batches)
    with using(model, statistics):
        result = evaluate(model, batches, world, config.precision, len(labels.names), labels.absent)

    report = _report(loaded, data, config, result) | {"labels": labels.summary()}
    if world.is_main:
        kind = data.split if config.image_size is None else f"{data.split}.{config.image_size}px"
        _tell(loaded, kind, labels, result, report)
    distributed.stop()
    return report


def _at_size(loaded: LoadedModel, image_size: int) -> LoadedModel:
    """Return the model for another image size.

    Raises ConfigError if its statistics would have to be measured anew and that was not asked for.
    """
    resized = loaded.at_size(image_size)
    needed = resized is not loaded and bool(reattention_norms(resized.model))
    if needed and not resized.description.calibrate_images:
        raise ConfigError(
            f"image_size={image_size}: the BatchNorm statistics of {loaded.found.file} are those of "
            f"{loaded.architecture.model.image_size} pixels, so add calibrate_images=512"
        )
    return resized


def _report(loaded: LoadedModel, data: DataConfig, config: EvalConfig, result: EvalResult) -> dict[str, Any]:
    return {
        "checkpoint": str(loaded.found.file),
        "weights": loaded.weights,
        "data": str(data.name),
        "split": data.split,
        "image_size": loaded.architecture.model.image_size,
        "precision": str(config.precision),
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "images": result.images,
        "images_per_s": round(result.images_per_s, 1),
    }


def _tell(loaded: LoadedModel, kind: str, labels: Labels, result: EvalResult, report: dict[str, Any]) -> None:
    table = Table("class", "top-1", "images", title=f"{kind}: {result.images} images")
    absent = set(labels.absent)
    every = zip(result.class_accuracy, labels.names, result.class_images, strict=True)
    per_class = sorted(each for place, each in enumerate(every) if place not in absent)
    for accuracy, name, images in per_class[:WORST_CLASSES]:
        table.add_row(readable(name), f"{accuracy:.4f}", str(images))
    if len(per_class) > WORST_CLASSES:
        table.add_row(f"... {len(per_class) - WORST_CLASSES} more, better ones", "", "")
    table.add_section()
    table.add_row("top-1", f"{result.top1:.4f}", str(result.images))
    table.add_row("top-5", f"{result.top5:.4f}", "")
    table.add_row("loss", f"{result.loss:.4f}", "")
    if labels.absent:
        present = len(labels.names) - len(labels.absent)
        table.add_row("outputs", f"{present} of {len(labels.names)}", "")
    table.add_row("images/s", f"{result.images_per_s:.0f}", "")
    console.print(table)
    by_class = {
        name: {"name": readable(name), "top1": accuracy, "images": images}
        for accuracy, name, images in per_class
    }
    file = loaded.found.beside(f"{loaded.weights}.{kind}.json")
    try:
        write_text(file, json.dumps({**report, "classes": by_class}, indent=1) + "\n")
        console.print(f"written: {file}")
    except OutputError as error:
        console.print(f"not written: {error}")
    print(json.dumps(report), flush=True)


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
