"""Measure how well the features of each block tell classes apart, by neighbours and by a linear probe."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from deepvit_train.commands.analyze_subject import Subject
from deepvit_train.config.analyze import AnalyzeConfig
from deepvit_train.config.recipe import Precision
from deepvit_train.console import amount, console, counted
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.label import labelled
from deepvit_train.data.loaders import Loaders
from deepvit_train.error import DataError
from deepvit_train.evaluation.calibration import calibrate, reattention_norms, using
from deepvit_train.evaluation.feature import FeatureBank, features_of, fill_bank, token_kinds
from deepvit_train.evaluation.linear_probe import LinearProbe, fit_linear_probe
from deepvit_train.evaluation.loaded import measure_statistics
from deepvit_train.evaluation.neighbour import NEIGHBOURS, classify_by_neighbours
from deepvit_train.models import DeepViT
from deepvit_train.models.walk import Walk, in_evaluation_mode, walk_through

CHOICE_SEED = 0  # the choice of training images is the same for every model
TRAIN = "train"
LINEAR = "linear"

# By kind of token and classifier the share of images that is right, for each block.
Accuracies = dict[str, dict[str, list[float]]]


def measure_features(subject: Subject, config: AnalyzeConfig, loaders: Loaders) -> dict[str, Any]:
    """Classify the images of the split by the features of each block, trained and untrained.

    Classes are those of the folders, so they need not be the model's. Returns the entry `depth` of
    analysis.json. Raises DataError if the splits do not fit each other or an image can't be read.
    """
    data = loaders.data
    train = open_split(data, TRAIN)
    index, _ = labelled(open_split(data, data.evaluated), train.classes, data, f"those of {train.folder}")
    if len(train.classes) < 2:
        raise DataError(f"{train.folder}: has one class; features=true needs two or more")
    images = min(len(train), config.features_images or len(train))
    if images < min(NEIGHBOURS):
        raise DataError(
            f"{train.folder}: features=true needs {amount(min(NEIGHBOURS), 'training image')}, not {images}"
        )
    chosen = "" if images == len(train) else f" of {len(train):,}, chosen at random"
    told = amount(images, "training image")
    console.print(f"features of {subject.label}: {data.evaluated} classified by {told}{chosen}")
    found: dict[str, Any] = {"train_images": images, "classes": len(train.classes), "split": data.evaluated}
    for state, model in subject.states(loaders.world.device).items():
        trained = state == "trained"
        with _statistics(subject, model, trained, config, loaders), in_evaluation_mode(model):
            found[state], found["images"] = _accuracies(
                walk_through(model), train, index, images, config, loaders
            )
    return found


def _accuracies(
    walk: Walk, train: ImageIndex, index: ImageIndex, images: int, config: AnalyzeConfig, loaders: Loaders
) -> tuple[Accuracies, int]:
    """Return the accuracies of a model, and of how many images they are."""
    batch_size, kinds = config.eval_batch_size, token_kinds(walk)
    bad = BadFiles([], loaders.data.max_bad, loaders.world, console.print)
    bank = fill_bank(walk, bad.watch(loaders.calibration(train, images, batch_size, CHOICE_SEED)), images)
    bad.settle()
    neighbours = [count for count in NEIGHBOURS if count <= len(bank.targets)]
    probes = _fit_probes(bank) if config.features_probe else {}
    # Neighbours are found by cosine, so from here on only directions are needed.
    bank = FeatureBank(F.normalize(bank.features, dim=-1, out=bank.features), bank.targets)
    names = [*(f"knn_{count}" for count in neighbours), *([LINEAR] if probes else [])]
    layers = bank.features.shape[0]
    right, seen = torch.zeros(layers, len(kinds), len(names), dtype=torch.int64), 0
    limit = None
    if (most := config.features_eval_images) is not None:
        batch_size = min(batch_size, most)
        limit = most // batch_size
    with counted(loaders.evaluation(index, batch_size, limit), "features of the split") as shown:
        for batch in shown:
            if batch.bad:
                raise DataError(f"{batch.bad[0]}: can't be read, and an evaluation replaces no image")
            features = features_of(walk, batch.images)
            seen += len(batch.images)
            for layer, kind in np.ndindex(layers, len(kinds)):
                given = features[layer, kind]
                guesses = classify_by_neighbours(
                    F.normalize(given, dim=-1),
                    bank.features[layer, kind],
                    bank.targets,
                    len(train.classes),
                    neighbours,
                )
                if probes:
                    guessed = probes[layer, kind].predict(given.cpu().numpy())
                    guesses.append(torch.from_numpy(guessed).to(batch.targets.device))
                for place, guess in enumerate(guesses):
                    right[layer, kind, place] += int((guess == batch.targets).sum())
    shares = (right.double() / seen).permute(1, 2, 0).tolist()
    return {kind: dict(zip(names, each, strict=True)) for kind, each in zip(kinds, shares, strict=True)}, seen


def _fit_probes(bank: FeatureBank) -> dict[tuple[int, ...], LinearProbe]:
    """Fit a linear probe to each block and kind of token."""
    targets, probes = bank.targets.cpu().numpy(), {}
    with counted(list(np.ndindex(*bank.features.shape[:2])), "linear probes") as shown:
        for place in shown:
            probes[place] = fit_linear_probe(bank.features[place].cpu().numpy(), targets)
    if unfinished := sum(not probe.converged for probe in probes.values()):
        console.print(f"linear probes that were not fitted to the end: {unfinished} of {len(probes)}")
    return probes


def _statistics(
    subject: Subject, model: nn.Module, trained: bool, config: AnalyzeConfig, loaders: Loaders
) -> AbstractContextManager[None]:
    """Let re-attention's BatchNorms use calibrated statistics, as an evaluation does.

    Those of the untrained model are measured on as many training images.
    """
    loaded = subject.loaded
    if loaded is None or not isinstance(model, DeepViT) or not reattention_norms(model):
        return nullcontext()
    if trained:
        statistics = loaded.statistics
        if loaded.needs_calibration:
            statistics = measure_statistics(
                loaded, loaders, config.eval_batch_size, Precision.fp32, console.print
            )
        return using(model, statistics)
    images = loaded.description.calibrate_images or config.features_images or config.eval_batch_size
    batches = loaders.calibration(
        open_split(loaders.data, TRAIN), images, config.eval_batch_size, loaded.description.seed
    )
    return using(model, calibrate(model, batches, Precision.fp32, loaders.world))
