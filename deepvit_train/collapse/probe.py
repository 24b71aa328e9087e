"""Measure collapse while a model trains, on the same images every time and without changing the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepvit_train.collapse import measure
from deepvit_train.collapse.contribution import contributions, replaceable
from deepvit_train.collapse.picture import draw_matrices
from deepvit_train.config.collapse import CollapseConfig, Maps, Metric
from deepvit_train.models.record import BlockRecord, record_maps

CHUNK = 8  # images whose maps are in memory at a time
SWAPPED = 8  # blocks whose maps are swapped, which keeps the cost of a look under 1 % of the training


@dataclass(frozen=True)
class Look:
    """The result of a probe: scalars by TensorBoard name, and the similarity matrices as a picture."""

    scalars: dict[str, float]
    picture: Tensor  # (1, 3, height, width) in 0..1

    @property
    def replaceable(self) -> float:
        """Return the share of blocks that do as well with the maps of the block before."""
        return self.scalars["collapse/replaceable_ratio"]


class Probe:
    """Measures collapse on fixed images (B, C, height, width), with re-attention's batch statistics.

    Args:
        images, classes: the images, and their classes (B,).
        config: how collapse is measured.
    """

    def __init__(self, images: Tensor, classes: Tensor, config: CollapseConfig) -> None:
        self.images = images
        self.classes = classes
        self.config = config
        self.looks = 0
        self.seconds = 0.0

    def look(self, model: nn.Module) -> Look:
        """Measure the model. Its mode, its buffers and the random generators stay as they are."""
        began = time.perf_counter()
        totals: dict[str, Tensor] = {}
        for images, classes in zip(self.images.split(CHUNK), self.classes.split(CHUNK), strict=True):
            with _batch_statistics(model):
                records = list(record_maps(model, images))
                contributed = contributions(model, [(images, classes)], at_most=SWAPPED)
            for name, value in (self._measures(records) | contributed).items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value * len(images)
        look = self._summary({name: total / len(self.images) for name, total in totals.items()})
        self.looks += 1
        self.seconds += time.perf_counter() - began
        return look

    def _measures(self, records: list[BlockRecord]) -> dict[str, Tensor]:
        axis, metric = self.config.axis, self.config.metric
        found = {}
        for maps in Maps:
            layers = [record.before if maps == Maps.pre_mix else record.after for record in records]
            if maps == Maps.post_norm and not any(record.mixes for record in records):
                continue  # without mixing they are the pre-mix maps
            for each in Metric:
                found[f"{maps}/{each}"] = measure.similarity_matrix(layers, axis, each)
            heads = [measure.off_diagonal_mean(measure.head_similarity(m, axis, metric)) for m in layers]
            found[f"deviation/{maps}"] = torch.stack([measure.deviation(layer) for layer in layers])
            found[f"heads/{maps}"] = torch.tensor(heads, dtype=torch.float64)
        features = [record.features for record in records]
        found["features"] = measure.feature_similarity(features)
        found["tokens"] = torch.tensor(measure.token_similarity(features[-1]), dtype=torch.float64)
        return found

    def _summary(self, found: dict[str, Tensor]) -> Look:
        maps = self.config.maps if f"{self.config.maps}/{self.config.metric}" in found else Maps.pre_mix
        matrix = found[f"{maps}/{self.config.metric}"]
        similar = measure.similar_blocks(matrix, self.config.threshold, self.config.k)
        scalars = {
            "collapse/replaceable_ratio": replaceable(found["map_swap"], self.config.swap_rise),
            "collapse/branch_share": float(found["branch_share"].mean()),
            "collapse/branch_share_least": float(found["branch_share"].min()),
            "collapse/similar_ratio": measure.similar_ratio(similar),
        }
        if len(found["map_swap"]):
            scalars["collapse/map_swap"] = float(found["map_swap"].mean())
        for name, value in found.items():
            kind, _, rest = name.partition("/")
            if kind in ("pre_mix", "post_norm") and len(value) > 1:
                scalars[f"collapse/similarity_{kind}_{rest}"] = float(value.diagonal(1).mean())
            elif kind == "deviation":
                scalars[f"collapse/deviation_{rest}"] = float(value.mean())
            elif kind == "heads":
                scalars[f"collapse/head_similarity_{rest}"] = float(value.mean())
        scalars["collapse/feature_cosine_to_last"] = float(found["features"][:, -1].mean())
        scalars["collapse/token_similarity_last"] = float(found["tokens"])
        pictured = {f"{maps.label} maps, {each} cosine": found[f"{maps}/{each}"] for each in reversed(Metric)}
        return Look(scalars, draw_matrices(pictured))


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorms over maps use the statistics of their batch, as in training, and keep none.

    Running statistics lag behind the weights while the learning rate is high.
    """
    # A frozen block trains and evaluates with the statistics that it came with.
    frozen = {module for part in getattr(model, "frozen", ()) for module in part.modules()}
    found = (getattr(module, "norm", None) for module in model.modules() if module not in frozen)
    norms: list[Any] = [norm for norm in found if isinstance(norm, nn.BatchNorm2d)]
    kept = [(norm, norm.running_mean, norm.running_var) for norm in norms]
    for norm in norms:
        norm.running_mean = norm.running_var = None
    try:
        yield
    finally:
        for norm, mean, variance in kept:
            norm.running_mean, norm.running_var = mean, variance
