"""End an analysis with advice: which blocks do nothing, and what helped models in such a state, how surely.

What helped is what the study of docs/study/ found; its findings.json lies beside this file. Where the study
has no finished row, that is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepvit_train.collapse.gallery import by_block
from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.console import amount
from deepvit_train.reading import read_json

FINDINGS = Path(__file__).with_name("findings.json")
LOST = 0.005  # of top-1: pruned models that lose less are named


def read_findings() -> dict[str, Any]:
    """Return the findings of the study that the package ships with, as `deepvit-study` wrote them."""
    return read_json(FINDINGS)


def verdict(model: dict[str, Any], config: CollapseConfig, study: dict[str, Any]) -> list[str]:
    """Return the advice on one model, a sentence or two a line.

    Args:
        model: its entry of `models` in analysis.json.
        study: from `read_findings`.

    Returns nothing where no classes were known, because then no loss could be measured.
    """
    if "removal" not in model["trained"]["averages"]:
        return []
    removal, swaps = (by_block(model["trained"], name) for name in ("removal", "map_swap"))
    idle = [block for block, rise in removal.items() if rise < config.swap_rise]
    copies = [block for block, rise in swaps.items() if rise < config.swap_rise]
    lines = [_idle(idle, config.swap_rise)]
    if "prune" in model:
        lines.append(_pruned(model["prune"]))
    if not idle and not copies:
        return [*lines, "The maps of every block matter, so there is nothing to change."]
    return [*lines, *_advice(model, copies, study)]


def _idle(blocks: list[int], limit: float) -> str:
    if not blocks:
        return f"Every block changes the answers: without any one the loss rises by {limit:g} or more."
    return (
        f"{_blocks(blocks)} by itself: without it the loss on these images rises by less than {limit:g}."
        if len(blocks) == 1
        else f"{_blocks(blocks)} each by itself: without one of them the loss on these images rises by less "
        f"than {limit:g}."
    )


def _blocks(blocks: list[int]) -> str:
    named = ", ".join(map(str, blocks))
    return f"Block {named} does nothing" if len(blocks) == 1 else f"Blocks {named} do nothing"


def _pruned(pruned: dict[str, Any]) -> str:
    top1 = pruned["top1"]
    count = max(number for number, value in enumerate(top1) if value >= top1[0] - LOST)
    if not count:
        return f"Without block {pruned['order'][0]} top-1 falls from {top1[0]:.4f} to {top1[1]:.4f}."
    gone = ", ".join(map(str, sorted(pruned["order"][:count])))
    return (
        f"{amount(count, 'block')} can be left out: without {gone} top-1 is {top1[count]:.4f} instead of "
        f"{top1[0]:.4f}, untrained after the cut."
    )


def _advice(model: dict[str, Any], copies: list[int], study: dict[str, Any]) -> list[str]:
    """Return what can be tried, each with what the study says of it."""
    shape, attn = model.get("model"), model.get("attn")
    if shape is None or attn is None:
        return []  # of timm, which this program does not train
    depth, plain = shape["depth"], attn["kind"] == "self"
    tried = []
    if shape["layer_scale"] is None:
        tried.append(("LayerScale (model.layer_scale=0.1)", _contrast(study, "layer_scale", depth)))
    tried.append(("a lower learning rate (optim.lr)", _rate(study, "plain" if plain else "paper", depth)))
    if plain and copies:
        mixing = f"mixing heads from block {copies[0]} on (attn=reattention attn.from_block={copies[0]})"
        tried.append((mixing, _contrast(study, "paper", depth)))
    tried.append((f"fewer blocks (model.depth, now {depth})", _depth(study, "plain" if plain else "paper")))
    return [f"To try: {what}. {said}" for what, said in tried]


def _contrast(study: dict[str, Any], arm: str, depth: int) -> str:
    """Say what an arm did to accuracy beside the first arm, at the depth of the study nearest to this one."""
    rows = [row for row in study.get("against_first", []) if row["arm"] == arm and _whole(row, study)]
    if not rows:
        return _unfinished(study)
    row = min(rows, key=lambda row: abs(row["depth"] - depth))
    did = "helped" if row["low"] > 0 else "did harm" if row["high"] < 0 else "made no sure difference"
    blocks, seeds = amount(row["depth"], "block"), amount(row["seeds"], "seed")
    return (
        f"In the study it {did} at {blocks}: {row['mean']:+.2f} points of top-1 beside plain attention "
        f"(95 %: {row['low']:+.2f} to {row['high']:+.2f}, {seeds})."
    )


def _rate(study: dict[str, Any], arm: str, depth: int) -> str:
    rows = [row for row in study.get("search", []) if row["arm"] == arm]
    if not rows or not _searched(study):
        return _unfinished(study)
    row = min(rows, key=lambda row: abs(row["depth"] - depth))
    tried = ", ".join(row["top1"])
    return (
        f"In the study {row['best']:g} was the best of {tried} at {amount(row['depth'], 'block')} (one seed)."
    )


def _depth(study: dict[str, Any], arm: str) -> str:
    rows = [row for row in study.get("accuracy", []) if row["arm"] == arm and _whole(row, study)]
    if len(rows) < 2:
        return _unfinished(study)
    told = ", ".join(
        f"{row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f}) with {amount(row['depth'], 'block')}"
        for row in rows
    )
    return f"In the study top-1 was {told}, in points with 95 % intervals."


def _whole(row: dict[str, Any], study: dict[str, Any]) -> bool:
    """Return whether a row rests on all seeds that were planned."""
    return row["seeds"] == study.get("seeds")


def _searched(study: dict[str, Any]) -> bool:
    """Return whether the search is over."""
    return study.get("searched") == study.get("searches")


def _unfinished(study: dict[str, Any]) -> str:
    return f"The study is not finished on this ({study.get('finished', 0)} of {study.get('cells', 0)} cells)."
