"""End an analysis with advice: which blocks do nothing, and what helped such models, how surely."""

from __future__ import annotations

from typing import Any

from deepvit_train.collapse.evidence import by_depth, effect, told_depths, told_effect, told_rate
from deepvit_train.collapse.gallery import by_block
from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.console import amount

ARMS = {"self": "plain", "reattention": "paper"}  # the study's arms by kind of attention
LOST = 0.005  # of top-1: pruned models that lose less are named


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
    if not idle and not swaps:
        return [*lines, "There is nothing to change."]
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
    """Return what can be tried, each with what the study says of it: first what helped most there."""
    shape, attn = model.get("model"), model.get("attn")
    if shape is None or attn is None:
        return []  # of timm, which this program does not train
    depth, plain = shape["depth"], attn["kind"] == "self"
    arms = []
    if shape["layer_scale"] is None:
        arms.append(("LayerScale (model.layer_scale=0.1)", "layer_scale"))
    # A norm of queries and keys takes such a factor out again.
    if plain and attn.get("qk_gain", 1.0) == 1.0 and not shape.get("qk_norm"):
        arms.append(("larger weights of queries and keys at the start (attn.qk_gain=4)", "sharp"))
    if plain and copies:
        mixing = f"mixing heads from block {copies[0]} on (attn=reattention attn.from_block={copies[0]})"
        arms.append((mixing, "paper"))
    found = [(what, effect(study, arm, depth)) for what, arm in arms]
    found.sort(key=lambda each: each[1]["mean"] if each[1] else 0.0, reverse=True)
    lines = [f"{_advised(row, plain)}: {what}. {told_effect(row, study, plain)}" for what, row in found]
    # The study's re-attention has a BatchNorm; of another norm its figures say nothing.
    studied = plain or attn.get("norm", "batch") == "batch"
    if studied and (own := ARMS.get(attn["kind"])) is not None:
        rows = by_depth(study, own)
        fewer = "Rather not" if rows and rows[-1]["low"] > rows[0]["high"] else "To try"
        lines += [
            f"To try: another learning rate (optim.lr). {told_rate(study, own, depth)}",
            f"{fewer}: fewer blocks (model.depth, now {depth}), which cost less. {told_depths(rows, study)}",
        ]
    return lines


def _advised(row: dict[str, Any] | None, plain: bool) -> str:
    """Say whether to try what an arm stands for; what the study does not know is worth a try."""
    if row is None:
        return "To try"
    if row["high"] < 0:
        return "Rather not"
    return "To try" if row["low"] > 0 and plain else "Uncertain"
