"""Say in sentences what the study of docs/study/ found: what helped, at which depth, and what tells accuracy.

Its findings.json lies beside this file, as `deepvit-study` wrote it. Where the study has no finished row,
that is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepvit_train.console import amount
from deepvit_train.reading import read_json

FINDINGS = Path(__file__).with_name("findings.json")
LOSS = "train/loss"
TOKENS = "collapse/token_similarity_last"  # the measure of collapse that told most about the accuracy

Study = dict[str, Any]


def read_findings() -> Study:
    """Return the findings of the study that the package ships with."""
    return read_json(FINDINGS)


def effect(study: Study, arm: str, depth: int) -> dict[str, Any] | None:
    """Return an arm's paired differences to the first arm, at the depth of the study nearest to this one.

    Its mean and the ends of its 95 % interval are in points of top-1. None if not all planned seeds are in.
    """
    rows = [row for row in study.get("against_first", []) if row["arm"] == arm and _whole(row, study)]
    return min(rows, key=lambda row: abs(row["depth"] - depth), default=None)


def told_effect(row: dict[str, Any] | None, study: Study, plain: bool) -> str:
    """Say what an arm did to the accuracy of plain attention. `plain`: whether the model at hand has it."""
    if row is None:
        return unfinished(study)
    did = "helped" if row["low"] > 0 else "did harm" if row["high"] < 0 else "made no sure difference"
    blocks, seeds = amount(row["depth"], "block"), amount(row["seeds"], "seed")
    said = (
        f"In the study it {did} with {blocks} and otherwise plain attention: {row['mean']:+.2f} points of "
        f"top-1 (95 %: {row['low']:+.2f} to {row['high']:+.2f}, {seeds})."
    )
    return said if plain else f"{said} With other attention it was not tried."


def told_rate(study: Study, arm: str, depth: int) -> str:
    """Say which learning rate was the best of those tried."""
    rows = [row for row in study.get("search", []) if row["arm"] == arm]
    if not rows or study.get("searched") != study.get("searches"):
        return unfinished(study)
    row = min(rows, key=lambda row: abs(row["depth"] - depth))
    rates = [float(rate) for rate in row["top1"]]
    end = {min(rates): " (the lowest)", max(rates): " (the highest)"}.get(row["best"], "")
    return (
        f"In the study {row['best']:g}{end} was the best of {', '.join(row['top1'])} at "
        f"{amount(row['depth'], 'block')} (one seed)."
    )


def by_depth(study: Study, arm: str) -> list[dict[str, Any]]:
    """Return an arm's accuracy at each depth, from shallow to deep. Empty if not two depths are finished."""
    rows = [row for row in study.get("accuracy", []) if row["arm"] == arm and _whole(row, study)]
    return sorted(rows, key=lambda row: row["depth"]) if len(rows) > 1 else []


def told_depths(rows: list[dict[str, Any]], study: Study) -> str:
    """Say how accuracy depended on the number of blocks."""
    if not rows:
        return unfinished(study)
    told = ", ".join(
        f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f}) with {amount(row['depth'], 'block')}"
        for row in rows
    )
    return f"In the study top-1 was {told}, in points with 95 % intervals."


def told_forecast(study: Study) -> str:
    """Say how much the tokens' likeness early in a training told about the accuracy at its end.

    It was not asked of models at the end of their training.
    """
    rows = {row["measure"]: row["within_depths"] for row in study.get("measures", [])}
    if not {LOSS, TOKENS} <= rows.keys() or study["finished"] < study["cells"]:
        return unfinished(study)
    return (
        "In the study, models whose tokens were less alike after a fifth of the training ended more "
        f"accurate: the rank correlation is {rows[TOKENS]:.2f} among models of one depth, that of the "
        f"training loss {rows[LOSS]:.2f}."
    )


def unfinished(study: Study) -> str:
    """Say how far the study is."""
    return f"The study is not finished on this ({study.get('finished', 0)} of {study.get('cells', 0)} cells)."


def _whole(row: dict[str, Any], study: Study) -> bool:
    """Return whether a row rests on all seeds that were planned."""
    return row["seeds"] == study.get("seeds")
