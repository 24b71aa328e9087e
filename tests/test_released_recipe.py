"""Show that the page on the authors' recipe says what our experiments compose."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deepvit_train.config.compose import compose_command, plain
from deepvit_train.run.folder import flatten

PAGE = Path(__file__).parent.parent / "docs" / "released-recipe.md"
EXPERIMENTS = ["deepvit_24b", "deepvit_32b", "deepvit_s", "deepvit_l"]
ROWS = [
    [cell.strip() for cell in line.split("|")[3:5]] for line in PAGE.read_text().splitlines() if "| `" in line
]
KEYS = {key.strip("`"): value for key, value in ROWS if key}


@pytest.mark.parametrize("place", range(4), ids=EXPERIMENTS)
def test_the_page_says_what_an_experiment_composes(place: int) -> None:
    composed = compose_command("train", [f"experiment={EXPERIMENTS[place]}", "data.root=/data/imagenet"])
    found = flatten(plain(composed))
    assert len(KEYS) > 25
    for key, said in KEYS.items():
        values = [said] * 4 if said.startswith("[") or "," not in said else said.split(",")
        expected = yaml.safe_load(values[place])
        assert found[key] == (float(expected) if isinstance(found[key], float) else expected), key
