"""Draw the figures of an analysis. Each shows a model beside the same model untrained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn

from deepvit_train.collapse import depth
from deepvit_train.collapse.answer import fitting
from deepvit_train.collapse.measurement import grid_of, similarity_name
from deepvit_train.config.collapse import CollapseConfig, Maps, Metric
from deepvit_train.models.record import record_maps
from deepvit_train.report.figure import Heat, Line, Panel, draw_bars, draw_heat, draw_lines, draw_overlays

STYLES = {"trained": "-", "untrained": "--"}
# Ends of an axis of cosines: on a scale of its own, the noise of values near 1 would look like a signal.
COSINES = (-0.25, 1.05)  # at least
FROM_ZERO = (0.0, None)
COLUMNS = 8  # heat maps or overlays in a row; of a deeper model only so many blocks are shown


@dataclass(frozen=True)
class Pictures:
    """The maps of one model for a few images, averaged over heads.

    Shapes: L layers, B images, N tokens.

    Args:
        attention: (L, B, rows, columns), the pre-mix weights of the class token over patches; without a class
            token, the mean over all queries.
        maps: (L, N, N), the pre-mix maps of the first image.
        mixed: (L, N, N), its post-norm maps; in blocks that do not mix heads these are the pre-mix maps.
        answers: what the model takes each image for, in words.
    """

    attention: Tensor
    maps: Tensor
    mixed: Tensor
    answers: list[str] = field(default_factory=list)


def take_pictures(model: nn.Module, images: Tensor) -> Pictures:
    """Run a model on images (B, C, height, width), and keep what it attends to."""
    attention, maps, mixed = [], [], []
    for record in record_maps(model, images):
        mean = record.before.mean(dim=1)
        height, width = grid_of(model, record)
        query = mean.mean(dim=1) if getattr(model, "cls_token", None) is None else mean[:, 0]
        patches = query[:, -height * width :]
        attention.append(rearrange(patches, "b (height width) -> b height width", height=height))
        maps.append(mean[0])
        mixed.append(record.after[0].mean(dim=0))
    return Pictures(torch.stack(attention).cpu(), torch.stack(maps).cpu(), torch.stack(mixed).cpu())


def draw_all(
    model: dict[str, Any],
    config: CollapseConfig,
    images: Tensor,
    classes: Sequence[str],
    pictures: dict[str, Pictures],
) -> dict[str, Figure]:
    """Draw every figure of one model. Returns them by name.

    Args:
        model: an entry of `models` in analysis.json.
        config: how collapse is measured.
        images: (B, 3, height, width) in 0..1, the images of the pictures.
        classes: the class of each of them.
        pictures: what the model attends to, under 'trained' and 'untrained'.
    """
    found = _curves(model, config, tokens=pictures["trained"].maps.shape[-1]) | {
        "matrix": _matrix(model, config),
        "similar_blocks": _bars(model, config),
    }
    found |= {"class_attention": _overlays(images, classes, pictures), "attention_maps": _map_heats(pictures)}
    if mixes(model):
        found["mixed_maps"] = _mixed_heats(pictures)
        found["theta"] = _theta(model["theta"])
    if model["depth"] is not None:
        found["depth"] = depth.draw(model["depth"])
    return found


def _curves(model: dict[str, Any], config: CollapseConfig, tokens: int) -> dict[str, Figure]:
    axis = config.axis
    kinds = [Maps.pre_mix, Maps.post_norm] if mixes(model) else [Maps.pre_mix]

    def by_maps(kind: str, label: str, names: dict[str, str], cosine: bool = True) -> list[Panel]:
        return [
            _panel(
                title,
                label,
                [
                    _line(model, state, f"{kind}/{maps}{name}", maps.label, colour)
                    for colour, maps in enumerate(kinds)
                    for state in STYLES
                ],
                cosine,
            )
            for title, name in names.items()
        ]

    def single(title: str, name: str, label: str, cosine: bool = False) -> Panel:
        return _panel(title, label, [_line(model, state, name, "", 0) for state in STYLES], cosine)

    metrics = {f"{metric} maps": f"/{metric}/{axis}" for metric in Metric}
    contributed = [single("branch share", "branch_share", "|attention branch| / |x|")]
    if "map_swap" in model["trained"]["averages"]:
        contributed += [
            single("with the maps of the block before", "map_swap", "rise of the loss, nats"),
            single("without the block", "removal", "rise of the loss, nats"),
        ]
    pruned = {}
    if "prune" in model:
        count = range(len(model["prune"]["top1"]))
        panel = Panel("accuracy", "blocks left out", "top-1", [Line("pruned", count, model["prune"]["top1"])])
        pruned["prune"] = draw_lines(
            [panel], "those that are missed least go first; nothing is trained again"
        )
    return pruned | {
        "contribution": draw_lines(contributed, "one block is changed at a time; means over images"),
        "similarity": draw_lines(
            [
                *by_maps("similarity", "cosine", metrics),
                *by_maps(
                    "deviation", "length of a row less its mean", {"deviation |A - 1/N|": ""}, cosine=False
                ),
            ],
            f"{axis} cosine between each block's maps and those of the block before",
        ),
        "head_similarity": draw_lines(
            by_maps("heads", "cosine", metrics), f"{axis} cosine between two heads of one block, mean"
        ),
        "features": draw_lines(
            [
                single("to the last block", "features", "cosine of features", cosine=True),
                single("between tokens of a block", "tokens", "cosine of features", cosine=True),
            ],
            "mean over tokens and images",
        ),
        "maps": draw_lines(
            [
                _entropy(model, tokens),
                single("attention distance", "distance", "patches"),
                single("rank", "rank", "singular values"),
            ],
            "pre-mix maps, mean over heads and images; rank: singular values above 0.001 of the largest",
        ),
    }


def _panel(title: str, label: str, lines: list[Line], cosine: bool) -> Panel:
    """Return a panel over blocks whose axis holds all values, and does not blow up small differences."""
    values = [value for line in lines for value in line.y if math.isfinite(value)]
    lowest = min(values, default=0.0)
    if cosine:
        return Panel(title, "block", label, lines, (min(COSINES[0], lowest - 0.05), COSINES[1]))
    return Panel(title, "block", label, lines, FROM_ZERO if lowest >= 0 else None)


def _entropy(model: dict[str, Any], tokens: int) -> Panel:
    """Draw the entropy under that of a uniform map, log N, which is the largest there is."""
    lines = [_line(model, state, "entropy", "", 0) for state in STYLES]
    most = math.log(tokens)
    uniform = Line(f"log {tokens}, uniform maps", lines[0].x, [most] * len(lines[0].x), 1, ":")
    return Panel("entropy", "block", "nats", [*lines, uniform], (0.0, 1.05 * most))


def mixes(model: dict[str, Any]) -> bool:
    """Return whether any block of a model in analysis.json mixes its heads."""
    return any(theta is not None for theta in model["theta"]["trained"])


def by_block(measured: dict[str, Any], name: str) -> dict[int, float]:
    """Return a measure as one number for each block.

    Similarities of maps are to the block before, those of features to the last block. Values of several
    heads are averaged.
    """
    values = measured["averages"][name]
    if name.startswith("similarity/"):
        return {block: values[block][block - 1] for block in range(1, len(values))}
    if name == "map_swap" or name.startswith("vectors/"):
        return dict(enumerate(values, start=1))
    if name == "features":
        return {block: row[-1] for block, row in enumerate(values)}
    return {
        block: sum(value) / len(value) if isinstance(value, list) else value
        for block, value in enumerate(values)
    }


def _line(model: dict[str, Any], state: str, name: str, label: str, colour: int) -> Line:
    values = by_block(model[state], name)
    shown = f"{label}, {state}" if label else state
    return Line(shown, list(values), list(values.values()), colour, STYLES[state])


def _matrix(model: dict[str, Any], config: CollapseConfig) -> Figure:
    names = {metric: similarity_name(config.maps, metric, config.axis) for metric in Metric}
    rows = [
        [Heat(f"{metric}, {state}", model[state]["averages"][name]) for state in STYLES]
        for metric, name in names.items()
    ]
    caption = f"{config.axis} cosine of {config.maps.label} maps"
    return draw_heat(rows, (-1.0, 1.0), caption, ("block", "block"))


def _bars(model: dict[str, Any], config: CollapseConfig) -> Figure:
    names = [f"{maps}/{metric}/{config.axis}" for maps in Maps for metric in Metric]
    series = {state: [model[state]["similar_blocks"][name]["ratio"] for name in names] for state in STYLES}
    labels = [f"{maps.label}, {metric}" for maps in Maps for metric in Metric]
    caption = f"similar: {config.axis} cosine > {config.threshold:g} to the {config.k} before (mean)"
    return draw_bars(labels, series, "ratio of similar blocks", caption)


def _overlays(images: Tensor, classes: Sequence[str], pictures: dict[str, Pictures]) -> Figure:
    blocks = _spread(len(pictures["trained"].maps))
    rows = [
        (
            "\n".join([f"is: {fitting(classes[number])}", f"{state}: {taken.answers[number]}"]),
            rearrange(image, "c height width -> height width c").numpy(),
            [taken.attention[block, number].numpy() for block in blocks],
        )
        for number, image in enumerate(images)
        for state, taken in pictures.items()
    ]
    caption = "weights of the class token over patches (pre-mix, mean of heads); each map has its own scale"
    return draw_overlays(rows, blocks, caption)


def _map_heats(pictures: dict[str, Pictures]) -> Figure:
    blocks = _spread(len(pictures["trained"].maps))
    rows = [
        [
            Heat(f"block {block}, {state}", (taken.maps[block] * taken.maps.shape[-1]).numpy())
            for block in blocks
        ]
        for state, taken in pictures.items()
    ]
    caption = "pre-mix map of image 0, mean of heads, in units of 1/N: 1 is the uniform map"
    return draw_heat(rows, (0.0, 2.0), caption, ("key", "query"))


def _mixed_heats(pictures: dict[str, Pictures]) -> Figure:
    blocks = _spread(len(pictures["trained"].mixed))
    rows = [
        [Heat(f"block {block}, {state}", taken.mixed[block].numpy()) for block in blocks]
        for state, taken in pictures.items()
    ]
    limit = max(float(np.abs(heat.values).max()) for row in rows for heat in row)
    caption = "post-norm map of image 0, mean of heads; red is above 0, blue below"
    return draw_heat(rows, (-limit, limit), caption, ("key", "query"))


def _theta(thetas: dict[str, list[Any]]) -> Figure:
    heats = {
        state: [
            Heat(f"block {block}, {state}", np.array(theta))
            for block, theta in enumerate(matrices)
            if theta is not None
        ]
        for state, matrices in thetas.items()
    }
    limit = max(float(np.abs(heat.values).max()) for column in heats.values() for heat in column)
    rows = [
        column[start : start + COLUMNS]
        for start in range(0, len(heats["trained"]), COLUMNS)
        for column in heats.values()
    ]
    return draw_heat(rows, (-limit, limit), "Theta of each block", ("head after mixing", "head before"))


def _spread(depth: int) -> list[int]:
    """Return at most COLUMNS blocks, spread evenly from the first to the last."""
    if depth <= COLUMNS:
        return list(range(depth))
    return [round(place * (depth - 1) / (COLUMNS - 1)) for place in range(COLUMNS)]
