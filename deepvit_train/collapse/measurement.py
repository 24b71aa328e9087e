"""Take every measure of one model, averaged over images, as data for JSON, figures and TensorBoard.

Shapes: L layers, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepvit_train.collapse import measure
from deepvit_train.config.collapse import Axis, CollapseConfig, Maps, Metric
from deepvit_train.models.attention import ReAttention
from deepvit_train.models.record import BlockRecord, record_maps

# Averages by name. Names and shapes are 'similarity/pre_mix/raw/column' (L, L), 'heads/pre_mix/raw/column'
# (L,), 'deviation/pre_mix' (L, H), 'features' (L, L), 'tokens' (L,), and for pre-mix maps 'entropy',
# 'distance' and 'rank' (L, H) and the paper's 'vectors/raw/column' (L - 1,). With `contributions` also
# 'branch_share' (L,), 'map_swap' (L - 1,), 'removal' (L,) and 'loss' ().
Measurement = dict[str, Tensor]


def measure_model(model: nn.Module, batches: Iterable[Tensor], k: int = 1) -> Measurement:
    """Take all measures of maps and features, averaged over the images (B, C, height, width) of all batches.

    `k` is that of `measure.ratio_of_vectors`. Memory holds the maps of one batch: L x B x H x N x N numbers,
    and twice as many if blocks mix heads.
    """
    totals: Measurement = {}
    images = 0
    for batch in batches:
        for name, value in measures(list(record_maps(model, batch)), model, k).items():
            totals[name] = totals.get(name, torch.zeros_like(value)) + len(batch) * value
        images += len(batch)
    return {name: total / images for name, total in totals.items()}


def grid_of(model: nn.Module, record: BlockRecord) -> tuple[int, int]:
    """Return the rows and columns of patches in a record. They are a square if the model does not tell."""
    patches = record.before.shape[-1] - record.prefix
    said = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if said is not None and said[0] * said[1] == patches:
        return said
    return math.isqrt(patches), math.isqrt(patches)


def similarity_name(maps: Maps, metric: Metric, axis: Axis) -> str:
    """Return the name of a similarity matrix in a Measurement."""
    return f"similarity/{maps}/{metric}/{axis}"


def similar(measurement: Measurement, config: CollapseConfig) -> Tensor:
    """Find the blocks that are similar to those before them, as configured. -> (L,), bool."""
    matrix = measurement[similarity_name(config.maps, config.metric, config.axis)]
    return measure.similar_blocks(matrix, config.threshold, config.k)


def as_data(measurement: Measurement, config: CollapseConfig) -> dict[str, Any]:
    """Turn a measurement into data for JSON: nested lists, and the similar blocks under every definition."""
    counts: dict[str, Any] = {}
    for name, value in measurement.items():
        kind, _, definition = name.partition("/")
        if kind == "similarity":
            found = measure.similar_blocks(value, config.threshold, config.k)
            counts[definition] = {
                "blocks": torch.nonzero(found).flatten().tolist(),
                "count": int(found.sum()),
                "ratio": measure.similar_ratio(found),
                "to_previous": _mean_of(value.diagonal(1)),
                "all_pairs": measure.off_diagonal_mean(value),
            }
    averages = {name: value.tolist() for name, value in measurement.items()}
    return {"similar_blocks": counts, "averages": averages}


def measures(records: Sequence[BlockRecord], model: nn.Module, k: int) -> Measurement:
    """Take all measures of one batch. `records` holds one record for each block of the model."""
    grid = grid_of(model, records[0])
    found: Measurement = {}
    for maps in Maps:
        layers = [record.before if maps == Maps.pre_mix else record.after for record in records]
        for metric in Metric:
            for axis in Axis:
                found[similarity_name(maps, metric, axis)] = measure.similarity_matrix(layers, axis, metric)
                heads = [measure.head_similarity(layer, axis, metric) for layer in layers]
                found[f"heads/{maps}/{metric}/{axis}"] = _column(map(measure.off_diagonal_mean, heads))
        found[f"deviation/{maps}"] = torch.stack([measure.deviation(layer) for layer in layers])
    softmax = [record.before for record in records]
    for metric in Metric:  # of columns, as in the paper
        found[f"vectors/{metric}/{Axis.column}"] = measure.ratio_of_vectors(softmax, Axis.column, metric, k)
    return found | {
        "features": measure.feature_similarity([record.features for record in records]),
        "tokens": _column(measure.token_similarity(record.features) for record in records),
        "entropy": torch.stack([measure.entropy(layer) for layer in softmax]),
        "distance": torch.stack([measure.attention_distance(layer, grid) for layer in softmax]),
        "rank": torch.stack([measure.rank(layer) for layer in softmax]),
    }


def _column(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def theta_of(model: nn.Module) -> list[list[list[float]] | None]:
    """Return Theta (H, H) of each block, whose rows are input heads; None for a block that does not mix."""
    blocks: Any = model.blocks
    mixing = [block.attn if isinstance(block.attn, ReAttention) else None for block in blocks]
    return [None if attn is None else attn.mixer.theta.tolist() for attn in mixing]


def _mean_of(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None
