"""Read the advice at the end of an analysis, of models in several states and studies in several stages."""

from __future__ import annotations

from typing import Any

import pytest

from deepvit_train.collapse.evidence import LOSS, TOKENS, read_findings, told_forecast
from deepvit_train.collapse.verdict import verdict
from deepvit_train.config.compose import compose_command

CONFIG = compose_command("analyze", ["checkpoint=x"]).collapse


def model_of(removal: list[float], swaps: list[float], **changes: Any) -> dict[str, Any]:
    averages = {"removal": removal, "map_swap": swaps}
    return {
        "trained": {"averages": averages},
        "model": {"depth": len(removal), "layer_scale": None},
        "attn": {"kind": "self"},
    } | changes


def row(arm: str, depth: int, low: float, high: float, seeds: int = 8) -> dict[str, Any]:
    mean = (low + high) / 2
    return {"arm": arm, "depth": depth, "mean": mean, "low": low, "high": high, "seeds": seeds}


STUDY = {
    "seeds": 8,
    "finished": 112,
    "cells": 112,
    "searched": 56,
    "searches": 56,
    "search": [
        {"arm": "plain", "depth": depth, "best": best, "top1": {"0.0003": 80, "0.001": 81}}
        for depth, best in ((8, 0.001), (24, 0.0003))
    ],
    "accuracy": [row("plain", 8, 85.0, 86.0), row("plain", 24, 83.0, 84.0)],
    "against_first": [
        row("layer_scale", 8, -0.2, 0.4),
        row("layer_scale", 24, 0.5, 1.5),
        row("paper", 24, -2.0, -1.0),
        row("sharp", 24, 1.0, 3.0),
    ],
    "measures": [
        {"measure": "train/loss", "within_depths": -0.7},
        {"measure": "collapse/token_similarity_last", "within_depths": -0.5},
    ],
}
IDLE = model_of([0.5, 0.001, 0.2, -0.3] * 5, [0.5, 0.001, 0.3] * 6 + [0.1])


def test_blocks_that_do_nothing_and_what_helped_such_models() -> None:
    lines = verdict(IDLE, CONFIG, STUDY)
    assert lines[0].startswith("Blocks 1, 3, 5, 7, 9, 11, 13, 15, 17, 19 do nothing each by itself")
    told = {line.partition(".")[0]: line for line in lines[1:]}
    assert "helped with 24 blocks and otherwise plain attention: +1.00 points" in " ".join(
        lines
    )  # the depth that is nearer to 20
    assert "95 %: +0.50 to +1.50, 8 seeds" in " ".join(lines)
    assert "mixing heads from block 2 on (attn=reattention attn.from_block=2). In the study it did harm" in (
        " ".join(lines)
    )
    assert "In the study 0.0003 (the lowest) was the best of 0.0003, 0.001 at 24 blocks" in " ".join(lines)
    assert (
        "top-1 was 85.50 (85.00 to 86.00) with 8 blocks, 83.50 (83.00 to 84.00) with 24 blocks"
        in " ".join(lines)
    )
    assert len(told) == len(lines) - 1
    # What helped most stands first, and what did harm is no advice.
    advice = [line.split(" (")[0] for line in lines[1:]]
    assert advice == [
        "To try: larger weights of queries and keys at the start",
        "To try: LayerScale",
        "Rather not: mixing heads from block 2 on",
        "To try: another learning rate",
        "To try: fewer blocks",
    ]


def test_a_shallow_model_gets_the_shallow_row() -> None:
    text = " ".join(verdict(model_of([0.001] * 6, [0.5] * 5), CONFIG, STUDY))
    assert "Uncertain: LayerScale" in text
    assert "it made no sure difference with 8 blocks and otherwise plain attention: +0.10" in text
    assert "mixing heads" not in text  # its maps matter


def test_a_model_that_has_layer_scale_and_mixes_is_not_told_to() -> None:
    mixing = IDLE | {"attn": {"kind": "reattention"}}
    text = " ".join(verdict(mixing, CONFIG, STUDY))
    assert "Uncertain: LayerScale" in text  # the study tried it with plain attention
    assert "8 seeds). With other attention it was not tried." in text
    model = IDLE | {"attn": {"kind": "reattention"}, "model": {"depth": 20, "layer_scale": 0.1}}
    text = " ".join(verdict(model, CONFIG, STUDY))
    assert "LayerScale" not in text
    assert "mixing heads" not in text
    assert "attn.qk_gain" not in text


def test_a_model_that_began_with_larger_weights_is_not_told_to() -> None:
    model = IDLE | {"attn": {"kind": "self", "qk_gain": 4.0}}
    assert "attn.qk_gain" not in " ".join(verdict(model, CONFIG, STUDY))
    normed = IDLE | {"model": {"depth": 20, "layer_scale": None, "qk_norm": True}}
    assert "attn.qk_gain" not in " ".join(verdict(normed, CONFIG, STUDY))


def test_a_form_of_attention_that_the_study_did_not_train_gets_no_figures_of_another() -> None:
    for attn in ({"kind": "talking_heads"}, {"kind": "reattention", "norm": "none"}):
        text = " ".join(verdict(IDLE | {"attn": attn}, CONFIG, STUDY))
        assert "learning rate" not in text
        assert "fewer blocks" not in text
    batch = IDLE | {"attn": {"kind": "reattention", "norm": "batch"}}
    assert "another learning rate" in " ".join(verdict(batch, CONFIG, STUDY))


def test_fewer_blocks_are_no_advice_where_more_helped() -> None:
    deeper = {**STUDY, "accuracy": [row("plain", 8, 80.0, 81.0), row("plain", 24, 83.0, 84.0)]}
    assert any(line.startswith("Rather not: fewer blocks") for line in verdict(IDLE, CONFIG, deeper))
    assert any(line.startswith("To try: fewer blocks") for line in verdict(IDLE, CONFIG, STUDY))


@pytest.mark.parametrize("study", [{}, {**STUDY, "finished": 14, "seeds": 9, "searched": 55}])
def test_an_unfinished_study_is_called_that(study: dict[str, Any]) -> None:
    lines = verdict(IDLE, CONFIG, study)
    advice = [line for line in lines if line.startswith("To try")]
    assert len(advice) == 5
    count = f"{study.get('finished', 0)} of {study.get('cells', 0)} cells"
    assert all(line.endswith(f"The study is not finished on this ({count}).") for line in advice)


def test_a_model_whose_every_block_matters_is_left_alone() -> None:
    lines = verdict(model_of([0.5, 0.2], [0.3]), CONFIG, STUDY)
    assert lines == [
        "Every block changes the answers: without any one the loss rises by 0.01 or more.",
        "The maps of every block matter, so there is nothing to change.",
    ]


def test_one_block() -> None:
    lines = verdict(model_of([0.5], []), CONFIG, STUDY)
    assert lines[1:] == ["There is nothing to change."]


def test_what_pruning_found() -> None:
    prune = {"order": [3, 1, 0, 2], "top1": [0.9, 0.901, 0.897, 0.5]}
    text = " ".join(verdict(IDLE | {"prune": prune}, CONFIG, STUDY))
    assert "2 blocks can be left out: without 1, 3 top-1 is 0.8970 instead of 0.9000" in text
    prune = {"order": [3, 1], "top1": [0.9, 0.7]}
    text = " ".join(verdict(IDLE | {"prune": prune}, CONFIG, STUDY))
    assert "Without block 3 top-1 falls from 0.9000 to 0.7000." in text


def test_no_classes_no_verdict_and_no_advice_for_timm() -> None:
    assert verdict({"trained": {"averages": {}}}, CONFIG, STUDY) == []
    timm = {key: value for key, value in IDLE.items() if key not in ("model", "attn")}
    assert len(verdict(timm, CONFIG, STUDY)) == 1


def test_what_the_study_says_of_the_measure() -> None:
    said = told_forecast(STUDY)
    assert "the rank correlation is -0.50 among models of one depth, that of the training loss -0.70." in said
    assert told_forecast({**STUDY, "finished": 14}).startswith("The study is not finished on this (14 of 112")
    assert told_forecast({}).startswith("The study is not finished on this")


def test_the_package_ships_findings_that_can_be_read() -> None:
    study = read_findings()
    assert study["cells"] == 112
    # What reports call the measure that told most must be that.
    told = {row["measure"]: abs(row["within_depths"]) for row in study["measures"] if row["predicts"]}
    assert sorted(told, key=lambda name: -told[name])[:2] == [LOSS, TOKENS]
    assert verdict(IDLE, CONFIG, study)
