"""`deepvit-predict` tells the classes of images, with the pixels that an evaluation would see."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from deepvit_train.atomic import new_folder
from deepvit_train.commands.predict_overlay import draw_overlays, overlay_name
from deepvit_train.commands.predict_row import RowWriter, rows_into, save_features
from deepvit_train.config.data import DataConfig
from deepvit_train.config.predict import PredictConfig
from deepvit_train.console import amount, notes, print_report, progress_bar
from deepvit_train.data.dataset import Batch
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.data.unlabelled import BAD, find_images
from deepvit_train.distributed.world import World, choose_device
from deepvit_train.error import DataError
from deepvit_train.evaluation.calibration import using
from deepvit_train.evaluation.loaded import LoadedModel, load_named, measure_statistics
from deepvit_train.precision import autocast


def run(config: PredictConfig) -> dict[str, Any]:
    """Write a row for each image that can be read. Rows go to stdout or to a file, all else to stderr.

    With a file the last line on stdout is a JSON object. Raises DataError if no image can be read.
    """
    world = World(rank=0, size=1, device=choose_device(config.device.value))
    if config.threads:
        torch.set_num_threads(config.threads)
    loaded = load_named(config)
    loaded.model.to(world.device)
    data = _data_for(loaded, config)
    index = _images_of(config, data)
    told = [f"{loaded.found.file}: {loaded.weights} weights", *loaded.told_preprocessing()]
    for line in [*told, *_told_of_names(loaded), *filter(None, [index.told_of_left_out()])]:
        notes.print(line)

    loaders, statistics = Loaders(loaded.architecture.model.preprocessing, data, world), loaded.statistics
    if loaded.needs_calibration:
        notes.print(f"calibrating on {amount(loaded.description.calibrate_images, 'training image')}")
        statistics = measure_statistics(loaded, loaders, config.batch_size, config.precision, notes.print)
    out = None if config.out is None else Path(config.out).expanduser()
    with using(loaded.model, statistics), rows_into(out, sys.stdout) as stream, ExitStack() as stack:
        folder = None
        if config.attention is not None:
            folder = stack.enter_context(new_folder(Path(config.attention).expanduser(), key="attention"))
        predictor = Predictor(loaded, config, index, stream, folder)
        start = time.perf_counter()
        predictor.run(loaders.prediction(index, config.batch_size))
        seconds = time.perf_counter() - start
    if out is not None and config.features:
        save_features(predictor.features, out.with_name(f"{out.name}.npy"))
    return _report(predictor, config, seconds)


@dataclass
class Predictor:
    """Predicts batch by batch, and counts.

    Args:
        loaded: the model.
        index: the images.
        stream: where the rows go.
        folder: where the overlays go, or None.
    """

    loaded: LoadedModel
    config: PredictConfig
    index: ImageIndex
    stream: IO[str]
    folder: Path | None
    rows: int = 0
    bad: list[str] = field(default_factory=list)
    not_finite: int = 0
    features: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def run(self, batches: Any) -> None:
        """Predict all images. Raises DataError if none can be read."""
        names = class_names(self.loaded)
        writer = RowWriter(self.stream, self.config.rows_as, names, min(self.config.top, len(names)))
        writer.begin()
        with _progress(len(self.index)) as advance:
            for batch in batches:
                self._predict(batch, writer)
                advance(len(batch.images))
        if not self.rows:
            why = self.bad[0] if self.bad else "the model's outputs are NaN or infinite for every one"
            raise DataError(f"no image can be told the class of: {why}")

    def _predict(self, batch: Batch, writer: RowWriter) -> None:
        model = self.loaded.model
        for line in batch.bad:
            notes.print(f"bad image, left out: {line}")
        self.bad += batch.bad
        with autocast(batch.images.device, self.config.precision):
            pooled = model.forward_head(model.forward_features(batch.images), pre_logits=True)
            logits = model.head(pooled)
        logits = logits.float()
        finite = logits.isfinite().all(dim=1)
        kept = finite & (batch.targets != BAD)
        self.not_finite += int((~finite & (batch.targets != BAD)).sum())
        # The order of classes is that of the logits, as in an evaluation: probabilities may round to equal.
        places = logits.topk(writer.top).indices
        probabilities = logits.softmax(dim=1).gather(1, places)
        columns = (kept, batch.targets, places, probabilities)
        for keep, number, classes, shares in zip(*(each.tolist() for each in columns), strict=True):
            if keep:
                writer.write(self.index.path(number), classes, shares)
                self.rows += 1
        if self.config.features:
            self.features.append(pooled[kept].float().cpu())
        if self.folder is not None:
            self._draw(batch, kept, self.folder)

    def _draw(self, batch: Batch, kept: Tensor, folder: Path) -> None:
        overlays = draw_overlays(
            self.loaded.model, batch.images[kept], self.loaded.architecture.model.preprocessing
        )
        for number, overlay in zip(batch.targets[kept].tolist(), overlays, strict=True):
            overlay.save(folder / overlay_name(number, self.index.path(number)))


def class_names(loaded: LoadedModel) -> list[str]:
    """Return the names of a model's outputs, in order. Those of a file that names none are numbers."""
    return loaded.description.classes or [str(number) for number in range(loaded.model.num_classes)]


def _told_of_names(loaded: LoadedModel) -> list[str]:
    if loaded.description.classes is not None:
        return []
    return [f"{loaded.found.file} names no classes, so they are numbers from 0; classes=FILE names them"]


def _data_for(loaded: LoadedModel, config: PredictConfig) -> DataConfig:
    """Return the data of the model's run where that is needed, and else only how images are read."""
    if config.images is None or loaded.needs_calibration:
        return loaded.data_for(config.data)
    return replace(config.data, value_range=config.data.value_range or loaded.description.value_range)


def _images_of(config: PredictConfig, data: DataConfig) -> ImageIndex:
    if config.images is None:
        return open_split(data, data.evaluated)
    return find_images(config.images, sys.stdin.buffer, data.follow_links)


@contextmanager
def _progress(images: int) -> Iterator[Any]:
    with progress_bar(notes) as bar:
        task = bar.add_task("images", total=images)
        yield lambda count: bar.advance(task, count)


def _report(predictor: Predictor, config: PredictConfig, seconds: float) -> dict[str, Any]:
    report = {
        "checkpoint": str(predictor.loaded.found.file),
        "weights": predictor.loaded.weights,
        "images": len(predictor.index),
        "rows": predictor.rows,
        "bad": len(predictor.bad),
        "images_per_s": round(len(predictor.index) / seconds, 1),
        "out": config.out,
    } | ({"not_finite": predictor.not_finite} if predictor.not_finite else {})
    if predictor.not_finite:
        notes.print(
            f"warning: outputs for {amount(predictor.not_finite, 'image')} are NaN or infinite, so they have "
            "no row"
        )
    notes.print(
        f"{amount(predictor.rows, 'image')} predicted, {amount(len(predictor.bad), 'bad one')} left out, "
        f"{report['images_per_s']} images/s"
    )
    if config.out is not None:
        print_report(report)
    return report
