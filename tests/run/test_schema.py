"""Tell in what the content of a run's file differs from what a run writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from deepvit_train.run import schema
from deepvit_train.run.schema import ANY, COUNT, FINITE, NUMBER, PATH, TEXT, misfit

FIXTURE = Path(__file__).parent.parent / "fixtures" / "run_of_0_1"


@pytest.mark.parametrize(
    ("value", "shape", "problem"),
    [
        ({"a": 1}, {"a": COUNT}, None),
        ({"a": 1, "later": []}, {"a": COUNT}, None),
        ({}, {"a?": COUNT}, None),
        ({}, {"a": COUNT}, "the content has no a"),
        ({"a": {}}, {"a": {"b": TEXT}}, "a has no b"),
        ({"a": True}, {"a": COUNT}, "a is not a whole number from 0 on"),
        ({"a": 2**53 + 1}, {"a": COUNT}, "a is not a whole number from 0 on"),
        ({"a": -1}, {"a?": COUNT}, "a is not a whole number from 0 on"),
        ({"x": 1, "y": "1"}, {ANY: NUMBER}, "y is not a number"),
        ({"x": float("inf")}, {ANY: NUMBER}, None),
        ({"x": float("inf")}, {ANY: FINITE}, "x is not a finite number"),
        ([1, [2]], [NUMBER], "1 is not a number"),
        ({"a": [{"b": 1}, {"b": None}]}, {"a": [{"b": NUMBER}]}, "a.1.b is not a number"),
        ([], {"a": COUNT}, "the content is not values under names"),
        ({}, [COUNT], "the content is not a list"),
        ("x" * 4096, PATH, " is not a path"),
        ("é" * 2047, PATH, None),
        ({"a": {"b": [1, "x", None]}, "c": 2.5}, schema.CONFIG, None),
        ({"a": {"b": [[1]]}}, schema.CONFIG, "a is not values under names"),
    ],
)
def test_the_first_misfit_is_named_with_its_place(value: object, shape: object, problem: str | None) -> None:
    assert misfit(value, shape) == problem


def test_a_run_of_version_0_1_0_fits() -> None:
    checkpoints = sorted((FIXTURE / "checkpoints").glob("step_*"))
    assert checkpoints
    for checkpoint in checkpoints:
        state = json.loads((checkpoint / "state.json").read_text())
        assert misfit(state, schema.STATE) is None
        assert misfit(state, schema.RESUMED) is None
        assert misfit(json.loads((checkpoint / "manifest.json").read_text()), schema.MANIFEST) is None
    assert misfit(yaml.safe_load((FIXTURE / "config.yaml").read_text()), schema.CONFIG) is None
