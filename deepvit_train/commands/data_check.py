"""`deepvit-data check` tells what is wrong with a data set, what it holds, and where a step's time goes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from deepvit_train.config.data_check import DataCheckConfig
from deepvit_train.config.preset import Architecture
from deepvit_train.console import amount, console, print_report, progress_bar
from deepvit_train.data import check
from deepvit_train.data.channel import channel_statistics
from deepvit_train.data.decode import BadImageError, Picture, parse_picture
from deepvit_train.data.index import ImageIndex, data_root
from deepvit_train.data.loaders import limits, worker_count
from deepvit_train.data.transform import normalise, train_transform
from deepvit_train.determinism import generators_kept
from deepvit_train.distributed import world as distributed
from deepvit_train.error import DataError
from deepvit_train.models import DeepViT
from deepvit_train.precision import autocast

SHOWN = 20  # errors and warnings in the tables; the JSON has all
CHANNEL_IMAGES = 1000  # of which mean and standard deviation are measured
WARM_UP_IMAGES = 16
TIMED_IMAGES = 128
TIMED_STEPS = 2
SPARE = 1.25  # more loader processes than the mean image asks for, because images differ
ROWS = ["images", "bad", "classes", "images_a_class", "kinds", "left_out", "width", "height", "bytes", "gib"]
PARTS = {
    "read": "from the disk",
    "decode": "to pixels",
    "augment": "crop, resize and vary",
    "copy": "to the device, and normalise",
    "compute": "forward and backward pass",
}


def run(config: DataCheckConfig) -> dict[str, Any]:
    """Check a data set. Prints tables, and a JSON object as the last line.

    Raises DataError where there is an error in it; damaged files that can be read are warnings.
    """
    root = data_root(config.data)
    if config.threads:
        torch.set_num_threads(config.threads)
    world = distributed.start(config.device.value, timeout_s=60)

    # List the folders, then read every file.
    names = dict.fromkeys(("train", config.data.evaluated))  # data.split=train names it twice
    splits = [check.list_split(root, config.data, name) for name in names]
    workers = worker_count(config.data)
    with progress_bar() as progress:
        for split in splits:
            bar = progress.add_task(f"reading {split.name}", total=len(split.index))
            advance = partial(progress.advance, bar)
            check.examine_split(split, limits(config.data), workers, advance)
    # The parts of one folder tell twice what is wrong with it.
    errors = list(dict.fromkeys(error for split in splits for error in split.errors))
    for other in splits[1:]:
        errors += check.compare_classes(splits[0], other, config.data.allow_subset)
        errors += check.duplicates(splits[0], other)

    fitting = check.value_range_of(splits[0])
    report = {
        "root": str(root),
        "errors": errors,
        "warnings": [
            *_told_of_values(config, splits[0], fitting),
            *dict.fromkeys(warning for split in splits for warning in split.warnings),
        ],
        "splits": {split.name: check.statistics_of(split) for split in splits},
        "value_range": fitting,
        "channels": channel_statistics(
            splits[0].index, config.model.preprocessing, limits(config.data), CHANNEL_IMAGES
        ),
        "timing": _timing(config, splits[0].index, world.device) if config.timing else None,
    }
    _tell(report)
    if splits[0].bad > config.data.max_bad:
        console.print(f"training would stop: more bad images than data.max_bad={config.data.max_bad}")
    print_report(report)
    if errors:
        raise DataError(f"errors in {root}: {len(errors)}; the first: {errors[0]}")
    return report


def _told_of_values(config: DataCheckConfig, train: check.Split, fitting: list[float] | None) -> list[str]:
    """A line on values of more than 8 bits that another data.value_range would fit better."""
    floats = any(kind.endswith(" F") for kind in train.extents)
    usual = [0.0, 1.0 if floats else 65535.0]
    if fitting is None or fitting == usual or config.data.value_range is not None:
        return []
    spans = ", ".join(f"{kind} {low:g}..{high:g}" for kind, (low, high) in sorted(train.extents.items()))
    low, high = fitting
    return [
        f"{train.name}: values of more than 8 bits are {spans}; data.value_range=[{low:g},{high:g}] fits "
        f"them, where {usual[0]:g}..{usual[1]:g} is black to white without it"
    ]


def _timing(config: DataCheckConfig, train: ImageIndex, device: torch.device) -> dict[str, Any] | None:
    """Time the parts of a step. Returns milliseconds for an image in one process, and how many loader
    processes keep up with the model; or None if there is no image to time.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    # The first images do not count: they load libraries and take memory.
    _load(config, train, WARM_UP_IMAGES, dict.fromkeys(PARTS, 0.0))
    pixels = _load(config, train, TIMED_IMAGES, seconds)
    if not len(pixels):
        return None
    seconds = {part: taken / len(pixels) for part, taken in seconds.items()}
    size = config.batch_size or (64 if device.type == "cuda" else 4)
    batch = torch.from_numpy(np.resize(pixels, (size, *pixels.shape[1:]))).permute(0, 3, 1, 2).contiguous()
    architecture = Architecture(config.model, config.attn)
    model = DeepViT(architecture, num_classes=max(2, len(train.classes))).to(device).train()
    mean, std = (torch.tensor(values, device=device) for values in (config.model.mean, config.model.std))
    targets = torch.zeros(size, dtype=torch.int64, device=device)
    for step in range(TIMED_STEPS + 1):
        if step == 1:  # the first step does not count either
            seconds["copy"] = seconds["compute"] = 0.0
        with _timed(seconds, "copy", device):
            images = normalise(batch.to(device), mean, std)
        with _timed(seconds, "compute", device):
            with autocast(device, config.precision):
                logits = model(images)
            F.cross_entropy(logits.float(), targets).backward()
    for part in ("copy", "compute"):
        seconds[part] /= TIMED_STEPS * size
    loading = seconds["read"] + seconds["decode"] + seconds["augment"]
    return {
        "ms_an_image": {part: round(1e3 * taken, 3) for part, taken in seconds.items()},
        "images": len(pixels),
        "batch_size": size,
        "device": str(device),
        "workers": max(1, math.ceil(SPARE * loading / (seconds["copy"] + seconds["compute"]))),
        "cores": len(os.sched_getaffinity(0)),
    }


def _load(config: DataCheckConfig, train: ImageIndex, most: int, seconds: dict[str, float]) -> np.ndarray:
    """Load a few images in this process, (N, size, size, 3), and add up the time of each part."""
    transform, loaded = train_transform(config.model.preprocessing, config.augment), []
    for image in np.linspace(0, len(train) - 1, min(most, len(train))).astype(int).tolist():
        path = train.path(image)
        _forget(train.file(image))
        try:
            with _timed(seconds, "read"):
                data = train.read(image, config.data.max_bytes)
            with _timed(seconds, "decode"):
                picture = parse_picture(path, data, limits(config.data))
            timed = replace(picture, decode=partial(_decode, picture, seconds))
            with generators_kept(), _timed(seconds, "augment"):
                loaded.append(transform(timed, seed=image)[0])
        except BadImageError:
            continue
    return np.stack(loaded) if loaded else np.empty(0)


def _decode(picture: Picture, seconds: dict[str, float], shrink: int, rows: int) -> tuple[np.ndarray, int]:
    """Decode what the augmentation asks for, and book the time under decode instead of augment."""
    start = time.perf_counter()
    decoded = picture.decode(shrink, rows)
    taken = time.perf_counter() - start
    seconds["decode"] += taken
    seconds["augment"] -= taken
    return decoded


@contextmanager
def _timed(seconds: dict[str, float], part: str, device: torch.device | None = None) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[part] += time.perf_counter() - start


def _forget(path: str) -> None:
    """Ask the system to forget a file that was just read, so that reading it again takes its real time."""
    try:
        # O_NONBLOCK, because opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    except OSError:
        return


def _tell(report: dict[str, Any]) -> None:
    splits = report["splits"]
    table = Table("", *splits, title=report["root"])
    for row in ROWS:
        table.add_row(row.replace("_", " "), *(_phrase(statistics[row]) for statistics in splits.values()))
    console.print(table)
    if channels := report["channels"]:
        mean, std = (",".join(f"{value:.4f}" for value in channels[name]) for name in ("mean", "std"))
        console.print(
            f"channels: model.mean=[{mean}] model.std=[{std}] are those of "
            f"{amount(channels['images'], 'training image')}"
        )
    if timing := report["timing"]:
        timed = amount(timing["images"], "image")
        table = Table("part of a step", "ms an image", "", title=f"{timed}, one process")
        for part, taken in timing["ms_an_image"].items():
            table.add_row(part, f"{taken:.3f}", PARTS[part])
        console.print(table)
        console.print(
            f"data.workers={timing['workers']} keeps up with {timing['device']} at "
            f"{amount(timing['batch_size'], 'image')} a batch; "
            f"this machine has {amount(timing['cores'], 'core')}"
        )
    for kind in ("errors", "warnings"):
        for line in report[kind][:SHOWN]:
            console.print(f"{kind[:-1]}: {line}")
        if len(report[kind]) > SHOWN:
            console.print(f"... {len(report[kind]) - SHOWN} more {kind}, in the JSON below")
    console.print(f"errors: {len(report['errors'])}, warnings: {len(report['warnings'])}")


def _phrase(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{value:,}"
    if "median" in value:
        return f"{value['min']:,} .. {value['median']:,} .. {value['max']:,}"
    return ", ".join(f"{count:,} {name}" for name, count in value.items())
