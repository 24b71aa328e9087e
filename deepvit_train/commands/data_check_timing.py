"""Time the parts of a training step for `deepvit-data check`, and say how long a run would take."""

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

from deepvit_train.config.compose import compose_command
from deepvit_train.config.data_check import DataCheckConfig
from deepvit_train.config.preset import Architecture
from deepvit_train.console import amount, console
from deepvit_train.data.decode import BadImageError, Picture, parse_picture
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.loaders import limits, worker_count
from deepvit_train.data.transform import normalise, train_transform
from deepvit_train.determinism import generators_kept
from deepvit_train.models import DeepViT
from deepvit_train.precision import autocast
from deepvit_train.training.forecast import phrase

WARM_UP_IMAGES = 16
TIMED_IMAGES = 128
TIMED_STEPS = 2
SPARE = 1.25  # more loader processes than the mean image asks for, because images differ
PARTS = {
    "read": "from the disk",
    "decode": "to pixels",
    "augment": "crop, resize and vary",
    "copy": "to the device, and normalise",
    "compute": "forward and backward pass",
}


def time_parts(config: DataCheckConfig, train: ImageIndex, device: torch.device) -> dict[str, Any] | None:
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
        **_whole_run(config, len(train), loading, seconds["copy"] + seconds["compute"]),
    }


def _whole_run(config: DataCheckConfig, images: int, loading_s: float, device_s: float) -> dict[str, Any]:
    """Return the epochs that deepvit-train does of this folder, and the hours that they take at this speed.

    Loader processes read images while the device computes. Without any the two take turns.

    Args:
        images: how many an epoch has.
        loading_s, device_s: seconds for an image in one process, and on the device.
    """
    epochs = compose_command("train", [f"data={config.data.name}", f"data.root={config.root}"]).trainer.epochs
    workers = worker_count(config.data)
    image_s = max(loading_s / workers, device_s) if workers else loading_s + device_s
    return {"epochs": epochs, "images_an_epoch": images, "hours": round(epochs * images * image_s / 3600, 4)}


def tell_timing(timing: dict[str, Any]) -> None:
    """Print what `time_parts` found."""
    timed = amount(timing["images"], "image")
    table = Table("part of a step", "ms an image", "", title=f"{timed}, one process")
    for part, taken in timing["ms_an_image"].items():
        table.add_row(part, f"{taken:.3f}", PARTS[part])
    console.print(table)
    run = f"{amount(timing['epochs'], 'epoch')} of {amount(timing['images_an_epoch'], 'image')}"
    console.print(
        f"at this speed deepvit-train takes about {phrase(3600 * timing['hours'])} for its usual {run}, "
        "without evaluations"
    )
    workers, where = timing["workers"], "the CPU" if timing["device"] == "cpu" else "the GPU"
    console.print(
        f"{amount(workers, 'process', 'processes')} (data.workers={workers}) can read images as fast as "
        f"{where} trains on them; this machine has {amount(timing['cores'], 'core')}"
    )


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
