"""An evaluation that no model made: predictions of images and classes, and what a report asks of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import log_softmax
from torch import nn

from deepvit_train.commands.evaluate_report import EvaluationReport
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.data.index import index_images
from deepvit_train.data.label import Labels
from deepvit_train.data.loaders import limits
from deepvit_train.evaluation.metric import surest_mistakes, worst_images
from deepvit_train.evaluation.prediction import NO_ANSWER, Predictions


def draw_predictions(images: int, classes: int, seed: int = 0, strength: float = 2.0) -> Predictions:
    """Draw logits that know the true class, and more often take a class for the next one."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes)).astype(np.float32)
    logits[np.arange(images), targets] += strength
    logits[np.arange(images), (targets + 1) % classes] += strength / 2
    return predictions_of(logits, targets)


def predictions_of(logits: np.ndarray, targets: np.ndarray) -> Predictions:
    """What logits say, in double precision."""
    logs = log_softmax(logits.astype(np.float64), axis=1)
    rows, finite = np.arange(len(targets)), np.isfinite(logits).any(axis=1)
    told = np.where(finite, logits.argmax(axis=1), NO_ANSWER)
    probability = np.where(finite, np.exp(logs.max(axis=1)), np.nan)
    return Predictions(rows, targets, told, probability, -logs[rows, targets], rows, logits)


def build_report(predictions: Predictions, classes: int, folder: Path, side: int = 64) -> EvaluationReport:
    """Make the report of predictions, and photographs of noise for those images that it shows."""
    names = [f"class {number:04} of $x_{number}$" for number in range(classes)]
    paths: dict[str, list[str]] = {name: [] for name in names}
    order = np.argsort(predictions.targets, kind="stable")
    for place in order.tolist():
        paths[names[predictions.targets[place]]].append(f"{names[predictions.targets[place]]}/{place:06}.jpg")
    index = index_images(folder / "val", paths)
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.arange(len(order))
    kept = Predictions(**{**vars(predictions), "images": numbers})
    rng = np.random.default_rng(1)
    for place in {*surest_mistakes(kept, 12), *worst_images(kept, 12)}:
        file = Path(index.path(int(numbers[place])))
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(file)
    data: Any = SimpleNamespace(max_bytes=1 << 20, max_pixels=1 << 20, value_range=None)
    assert limits(data).max_pixels
    preprocessing = Preprocessing(
        image_size=side, mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1.0, interpolation="bicubic"
    )
    loaded = SimpleNamespace(
        model=nn.Linear(4, classes),
        found=SimpleNamespace(run=None),
        architecture=SimpleNamespace(model=SimpleNamespace(preprocessing=preprocessing)),
    )
    right = float(predictions.right.mean())
    evaluated: Any = SimpleNamespace(
        loaded=loaded,
        data=data,
        labels=Labels(names),
        partial=False,
        total=len(predictions),
        file=lambda: folder / "model.live.val.json",
        report=lambda: {
            "checkpoint": "model.safetensors",
            "weights": "live",
            "split": "val",
            "images": len(predictions),
            "image_size": side,
            "precision": "fp32",
            "top1": right,
            "top5": right,
        },
    )
    return EvaluationReport(evaluated, index, kept)
