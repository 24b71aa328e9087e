"""Take from a finished cell's run what a study compares. Nothing in it depends on the machine or the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepvit_train.commands.study_store import read_lines
from deepvit_train.error import CheckpointError
from deepvit_train.reading import read_json
from deepvit_train.run.schema import MEASURED, NUMBER
from deepvit_train.run.tensor import digest_of_tensors, read_tensors

EARLY = 0.2  # share of the training at which a measure is taken as a forecast
DIGITS = 6  # significant ones
# By block, beside what the figures show.
BY_BLOCK = [*MEASURED["by_block"], "branch_share", "map_swap", "removal", "deviation/pre_mix"]
FORECASTS = ("collapse/", "train/loss", "train/grad_norm", "train/query_key_gradient")


def found_in(run: Path, *, analysed: bool) -> dict[str, Any]:
    """Return the numbers of a cell's run. Raises CheckpointError where they can't be read.

    Args:
        analysed: whether deepvit-analyze ran as well; a cell of a search needs its accuracy alone.
    """
    lines = read_lines(run)
    losses = [line["train/loss"] for line in lines if NUMBER.fits(line.get("train/loss"))]
    tops = [line["val/top1"] for line in lines if NUMBER.fits(line.get("val/top1"))]
    if not losses or not tops:
        raise CheckpointError(f"{run / 'metrics.jsonl'}: holds no training loss or no accuracy")
    found: dict[str, Any] = {"train_loss": losses[-1], "weights": _digest(run)}
    if not analysed:
        return _rounded(found | {"top1": tops[-1]})
    analysis = read_json(run / "analysis" / "analysis.json")["models"][0]
    accuracy = {
        name: {key: analysis["accuracy"][name][key] for key in ("top1", "loss", "images")}
        for name in ("calibrated", "running")
    }
    states = {state: _compact(analysis[state]) for state in ("trained", "untrained")}
    return _rounded(found | {"accuracy": accuracy, "early": _early(lines), **states})


def _digest(run: Path) -> str:
    """Return the SHA-256 of the trained weights, whatever their file says beside them."""
    return digest_of_tensors(read_tensors(run / "checkpoints" / "last" / "model.safetensors"))


def _early(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the scalars of the look nearest to a fifth of the training, or None where there was no look."""
    last = max(line["step"] for line in lines)
    looks = {line["step"] for line in lines if line["step"] and "collapse/branch_share" in line}
    if not looks:
        return None
    step = min(looks, key=lambda each: (abs(each - EARLY * last), each))
    merged = {key: value for line in lines if line["step"] == step for key, value in line.items()}
    return {"step": step, "steps": last} | {
        key: value for key, value in sorted(merged.items()) if key.startswith(FORECASTS)
    }


def _compact(measured: dict[str, Any]) -> dict[str, Any]:
    """Reduce a measurement to its similar blocks and to one number for each measure and block."""
    by_block: dict[str, Any] = {}
    for name in BY_BLOCK:
        values = measured["averages"][name]
        if name.startswith("similarity/"):
            by_block[name] = [None, *[row[block] for block, row in enumerate(values[1:])]]
        elif name == "features":
            by_block[name] = [row[-1] for row in values]
        elif name == "map_swap":
            by_block[name] = [None, *values]  # the first block has none before it
        elif isinstance(values[0], list):
            by_block[name] = [sum(heads) / len(heads) for heads in values]
        else:
            by_block[name] = values
    definitions = {
        name: {key: value for key, value in found.items() if key != "blocks"}
        for name, found in measured["similar_blocks"].items()
        if name.endswith("/column")
    }
    return {"similar_blocks": definitions, "by_block": by_block}


def _rounded(value: Any) -> Any:
    """Round the numbers in nested data, so that a cell's file is small."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
