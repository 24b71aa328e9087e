"""Find what the cells of a study say: accuracies, paired differences, tests, and which measure predicts.

docs/study/plan.md says why each of these is looked at. All accuracies and differences are in points (0..100).
Everything works on a study that is not finished, and says on how many seeds it rests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from deepvit_train.commands.study_grid import NOT_FINITE, SEARCH, searches_of
from deepvit_train.commands.study_statistics import (
    bootstrap,
    equivalence,
    interval,
    paired,
    spearman,
)
from deepvit_train.config.study import GridConfig, arms_of
from deepvit_train.evaluation.interval import holm

Cell = dict[str, Any]  # the JSON of a finished cell
Row = dict[str, Any]

MARGIN = 0.5  # points: a smaller difference is called none
CHANCE = 10.0  # points: the accuracy of a training that was not finite
# Measures at a fifth of the training that may tell the accuracy at the end. The first is the one to beat.
MEASURES = (
    "train/loss",
    "collapse/map_swap",
    "collapse/replaceable_ratio",
    "collapse/branch_share",
    "collapse/branch_share_least",
    "train/query_key_gradient",
    "train/query_key_gradient_least",
    "collapse/similarity_pre_mix_raw",
    "collapse/similarity_pre_mix_centred",
    "collapse/deviation_pre_mix",
    "collapse/token_similarity_last",
)


def findings(cells: Sequence[Cell], grid: GridConfig) -> Row:
    """Return all findings as data for JSON.

    The first arm of `study.attentions` is the one that others are compared with, the second is what the study
    is about, and the others are its controls. 'Deep' and 'shallow' are the ends of `study.depths`.

    Args:
        cells: cells of the study proper and of its search that are finished, or were not finite. Those of
            another width are left out.
    """
    cells = [cell for cell in cells if cell["dim"] == grid.dim]
    searched = [cell for cell in cells if cell["name"].startswith(SEARCH)]
    proper = [cell for cell in cells if not cell["name"].startswith(SEARCH)]
    names = [arm.name for arm in arms_of(grid.attentions)]
    names += sorted({cell["attn"] for cell in proper} - {*names})
    depths = sorted({cell["depth"] for cell in proper})
    accuracy = {(cell["attn"], cell["depth"], cell["seed"]): _points(cell) for cell in proper}
    planned = _planned(grid)
    found: Row = {
        "arms": names,
        "finished": sum(place in accuracy for place in planned),
        "cells": len(planned),
        "searched": len({cell["name"] for cell in searched} & {cell.name for cell in searches_of(grid)}),
        "searches": len(searches_of(grid)),
        "search": [_search_row(searched, name, at) for name in names for at in _depths_of(searched, name)],
        "accuracy": [
            row for depth in depths for name in names if (row := _accuracy_row(proper, name, depth))
        ],
        "against_first": [
            row
            for depth in depths
            for name in names[1:]
            if (row := _contrast(accuracy, name, names[0], depth))
        ],
    }
    if len(arms_of(grid.attentions)) > 1 and len(grid.depths) > 1:
        found |= _tests(accuracy, found["search"], grid)
    counted = [cell for cell in proper if (cell["attn"], cell["depth"], cell["seed"]) in planned]
    return found | {"measures": _measures(counted)}


def _planned(grid: GridConfig) -> list[tuple[str, int, int]]:
    arms = arms_of(grid.attentions)
    return [(arm.name, depth, seed) for arm in arms for depth in grid.depths for seed in grid.seeds]


def _points(cell: Cell) -> float:
    if cell.get("exit_code") == NOT_FINITE:
        return CHANCE
    return 100 * cell["accuracy"]["calibrated"]["top1"]


def _depths_of(searched: Sequence[Cell], name: str) -> list[int]:
    return sorted({cell["depth"] for cell in searched if cell["attn"] == name})


def _search_row(searched: Sequence[Cell], name: str, depth: int) -> Row:
    """Return the accuracy of each learning rate that was tried for an arm at a depth."""
    found: dict[float, list[float]] = {}
    for cell in searched:
        if (cell["attn"], cell["depth"]) == (name, depth):
            found.setdefault(cell["rate"], []).append(100 * cell.get("top1", 0.0))
    rates = {rate: mean(found[rate]) for rate in sorted(found)}
    best = max(rates, key=lambda rate: rates[rate])
    return {
        "arm": name,
        "depth": depth,
        "top1": {f"{rate:g}": round(value, 3) for rate, value in rates.items()},
        "best": best,
        "best_top1": round(rates[best], 3),
        "at_end": best in (min(rates), max(rates)),
    }


def _accuracy_row(proper: Sequence[Cell], name: str, depth: int) -> Row | None:
    members = [cell for cell in proper if (cell["attn"], cell["depth"]) == (name, depth)]
    if not members:
        return None
    values = {str(cell["seed"]): round(_points(cell), 3) for cell in members}
    low, high = interval(list(values.values()), 0.95)
    return {
        "arm": name,
        "depth": depth,
        "rate": members[0].get("rate"),
        "seeds": len(values),
        "top1": values,
        "mean": mean(values.values()),
        "low": low,
        "high": high,
    }


def _contrast(accuracy: dict[Any, float], name: str, other: str, depth: int) -> Row | None:
    """Describe the differences between two arms at a depth, seed by seed. None without a pair."""
    pairs = {
        seed: accuracy[name, depth, seed] - accuracy[other, depth, seed]
        for arm, at, seed in sorted(accuracy)
        if (arm, at) == (name, depth) and (other, depth, seed) in accuracy
    }
    if not pairs:
        return None
    row = {"arm": name, "against": other, "depth": depth, "seeds": len(pairs)}
    return row | asdict(paired([round(value, 3) for value in pairs.values()]))


def _tests(accuracy: dict[Any, float], searched: list[Row], grid: GridConfig) -> Row:
    """Return the primary test, the secondary ones, and the comparison with the best control."""
    first, subject, *controls = (arm.name for arm in arms_of(grid.attentions))
    shallow, deep = min(grid.depths), max(grid.depths)
    places = [(subject, deep), (first, deep), (subject, shallow), (first, shallow)]
    gains = [
        sum(sign * accuracy[*place, seed] for sign, place in zip((1, -1, -1, 1), places, strict=True))
        for seed in grid.seeds
        if all((*place, seed) in accuracy for place in places)
    ]
    secondary = [
        row for other in (first, *controls) if (row := _contrast(accuracy, subject, other, deep)) is not None
    ]
    for row, p in zip(secondary, holm([row["p"] for row in secondary]), strict=True):
        row["p_holm"] = p
    found: Row = {"seeds": len(grid.seeds), "subject": subject, "shallow": shallow, "deep": deep}
    found["primary"] = asdict(paired([round(gain, 3) for gain in gains])) if gains else None
    found["secondary"] = secondary
    alone = [row for row in searched if row["depth"] == deep and row["arm"] in controls]
    alone = [row for row in alone if not _mixes(grid, row["arm"])]
    best = max(alone, key=lambda row: row["best_top1"], default=None)
    row = None if best is None else _contrast(accuracy, subject, best["arm"], deep)
    if row is not None:
        row["equivalent"], row["low90"], row["high90"] = equivalence(row["differences"], MARGIN)
    return found | {"best_control": row}


def _mixes(grid: GridConfig, name: str) -> bool:
    """Return whether an arm trains a mixing of heads."""
    overrides = next(arm for arm in arms_of(grid.attentions) if arm.name == name).overrides
    return "attn=self" not in overrides and "attn.theta_frozen=true" not in overrides


def _measures(planned: Sequence[Cell]) -> list[Row]:
    """Correlate each measure at a fifth of the training with the accuracy at the end.

    Args:
        planned: the cells of the study's own arms and depths. Further ones, such as those of `study=cpu_32`,
            would give the arms that went deeper more weight.
    """
    seen = [cell for cell in planned if cell.get("early") and "accuracy" in cell]
    rows = []
    for name in MEASURES:
        members = [cell for cell in seen if name in cell["early"]]
        if len(members) < 3:
            continue
        points = [(cell, cell["early"][name], _points(cell)) for cell in members]
        arms, depths, seeds = (sorted({cell[key] for cell in members}) for key in ("attn", "depth", "seed"))
        everything = [(x, y) for _, x, y in points]
        without = [_correlation([(x, y) for cell, x, y in points if cell["attn"] != arm]) for arm in arms]
        within = [_correlation([(x, y) for cell, x, y in points if cell["depth"] == at]) for at in depths]
        groups = [[(x, y) for cell, x, y in points if cell["seed"] == seed] for seed in seeds]
        low, high = bootstrap(groups, _correlation)
        signs = {value > 0 for value in (low, high, *without, *within) if value == value}
        rows.append(
            {
                "measure": name,
                "cells": len(members),
                "rho": _correlation(everything),
                "low": low,
                "high": high,
                "without_an_arm": [min(without), max(without)],
                "within_depths": mean(within),
                "predicts": len(signs) == 1 and low == low,
            }
        )
    return rows


def _correlation(pairs: Sequence[tuple[float, float]]) -> float:
    return spearman([x for x, _ in pairs], [y for _, y in pairs])
