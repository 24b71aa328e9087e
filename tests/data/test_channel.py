"""Mean and standard deviation of a data set, against NumPy on all of its pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.config.compose import compose_command
from deepvit_train.data.channel import channel_statistics
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import open_split
from tests.conftest import Command

LIMITS = Limits(max_bytes=10**8, max_pixels=10**8)


def test_they_are_those_of_all_pixels(tmp_path: Path) -> None:
    rng, pictures = np.random.default_rng(0), []
    for number in range(12):
        folder = tmp_path / "train" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        pictures.append(rng.integers(0, 40 + 15 * number, (16, 16, 3), dtype=np.uint8))
        Image.fromarray(pictures[-1]).save(folder / f"{number}.png")
    (tmp_path / "train" / "0" / "bad.png").write_bytes(b"no image")
    config = compose_command("train", ["data=imagefolder", f"data.root={tmp_path}", "model=digits"])
    index = open_split(config.data, "train")
    found = channel_statistics(index, config.model.preprocessing, LIMITS, images=100)
    assert found is not None
    values = np.stack(pictures).reshape(-1, 3) / 255
    assert found["mean"] == pytest.approx(values.mean(axis=0), abs=1e-4)
    assert found["std"] == pytest.approx(values.std(axis=0), abs=1e-4)
    assert found["images"] == 12
    few = [channel_statistics(index, config.model.preprocessing, LIMITS, images=5) for _ in range(2)]
    assert few[0] == few[1] != found


def test_the_check_prints_keys_that_can_be_typed(image_folder: Path, call: Command) -> None:
    said = call("data-check", str(image_folder), "timing=false", "model=digits", "data.workers=0")
    report = json.loads(said.stdout.splitlines()[-1])["channels"]
    line = next(line for line in said.stdout.splitlines() if line.startswith("channels: "))
    keys = [word for word in line.split() if word.startswith("model.")]
    model = compose_command("train", keys).model
    assert (model.mean, model.std) == (report["mean"], report["std"])
    assert report["images"] == 24
