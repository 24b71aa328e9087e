"""`deepvit-eval`: what a checkpoint gets right, on its own data or other data of the same classes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from rich.table import Table
from timm.data import ImageNetInfo

from deepvit_train.atomic import write_text
from deepvit_train.config.command import EvalConfig
from deepvit_train.config.data import DataConfig
from deepvit_train.console import console
from deepvit_train.data.index import open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed import world as distributed
from deepvit_train.error import ConfigError, OutputError
from deepvit_train.evaluation.accuracy import EvalResult, evaluate
from deepvit_train.evaluation.calibration import reattention_norms, using
from deepvit_train.evaluation.loaded import LoadedModel, load, measure_statistics, result_file

WORST_CLASSES = 5  # shown in the table; the JSON file has all


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint: a table, a JSON file beside it, and a JSON object as the last line on stdout."""
    world = distributed.start(config.device.value, config.timeout_s)
    if config.threads:
        torch.set_num_threads(config.threads)
    say = console.print if world.is_main else lambda line: None

    # The model and its preprocessing, from the checkpoint alone, unless it is another project's.
    loaded = load(config.checkpoint, config.weights.value, config.preset, **config.said())
    if config.calibrate_images is not None:
        loaded = replace(loaded, calibrate_images=config.calibrate_images, statistics=None)
    if config.image_size is not None:
        loaded = _at_size(loaded, config.image_size)
    model, preprocessing = loaded.model.to(world.device), loaded.architecture.model.preprocessing
    say(f"{loaded.file}: {loaded.weights} weights")

    # The data: the run's own unless told otherwise.
    data = loaded.data_for(config.data)
    index = open_split(data, data.split)
    classes = loaded.check_data(index)

    # Calibrate where there are no statistics for these weights at this size, then evaluate.
    loaders, statistics = Loaders(preprocessing, data, world), loaded.statistics
    if loaded.needs_calibration:
        say(
            f"no calibrated statistics for these weights at {preprocessing.image_size} pixels: "
            f"calibrating on {loaded.calibrate_images} training images"
        )
        statistics = measure_statistics(loaded, loaders, config.batch_size, config.precision, say)
    batches = loaders.evaluation(index, config.batch_size, config.limit_batches)
    with using(model, statistics):
        result = evaluate(model, batches, world, config.precision, len(classes))

    report = _report(loaded, data, config, result)
    if world.is_main:
        kind = data.split if config.image_size is None else f"{data.split}.{config.image_size}px"
        _tell(loaded, kind, classes, result, report)
    distributed.stop()
    return report


def _at_size(loaded: LoadedModel, image_size: int) -> LoadedModel:
    """The model for another image size. Raises ConfigError where its statistics can't be measured anew."""
    resized = loaded.at_size(image_size)
    if resized is not loaded and reattention_norms(resized.model) and not resized.calibrate_images:
        raise ConfigError(
            f"image_size={image_size}: the BatchNorm statistics of {loaded.file} are those of "
            f"{loaded.architecture.model.image_size} pixels, so add calibrate_images=512"
        )
    return resized


def _report(loaded: LoadedModel, data: DataConfig, config: EvalConfig, result: EvalResult) -> dict[str, Any]:
    return {
        "checkpoint": str(loaded.file),
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


def _tell(
    loaded: LoadedModel, kind: str, classes: list[str], result: EvalResult, report: dict[str, Any]
) -> None:
    table = Table("class", "top-1", "images", title=f"{kind}: {result.images} images")
    per_class = sorted(zip(result.class_accuracy, classes, result.class_images, strict=True))
    for accuracy, name, images in per_class[:WORST_CLASSES]:
        table.add_row(readable(name), f"{accuracy:.4f}", str(images))
    if len(per_class) > WORST_CLASSES:
        table.add_row(f"... {len(per_class) - WORST_CLASSES} more, better ones", "", "")
    table.add_section()
    table.add_row("top-1", f"{result.top1:.4f}", str(result.images))
    table.add_row("top-5", f"{result.top5:.4f}", "")
    table.add_row("loss", f"{result.loss:.4f}", "")
    table.add_row("images/s", f"{result.images_per_s:.0f}", "")
    console.print(table)
    by_class = {
        name: {"name": readable(name), "top1": accuracy, "images": images}
        for accuracy, name, images in per_class
    }
    file = result_file(loaded, kind)
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
    """A class folder's name; with the word for it where it is one of ImageNet's WordNet ids."""
    if not re.fullmatch(r"n\d{8}", class_name):
        return class_name
    try:
        return f"{class_name} ({_imagenet().label_name_to_description(class_name)})"
    except KeyError:
        return class_name
