"""`deepvit-analyze features=true` tells by the features of which block classes are told apart."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepvit_train.collapse import depth
from deepvit_train.commands import analyze, train
from deepvit_train.config.compose import compose_command
from deepvit_train.error import DataError
from deepvit_train.evaluation.calibration import using
from deepvit_train.evaluation.linear_probe import fit_linear_probe
from deepvit_train.evaluation.loaded import load
from tests.conftest import QUICK

QUICKLY = ["threads=1", "collapse.images=4", "data.workers=0", "features=true"]


def analysed(*overrides: str) -> dict[str, Any]:
    return analyze.run(compose_command("analyze", [*QUICKLY, *overrides]))["models"][0]["depth"]


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train.run(compose_command("train", [*QUICK, f"run_dir={folder}"]))
    return folder


@pytest.fixture(scope="module")
def found(trained: Path) -> dict[str, Any]:
    return analysed(f"checkpoint={trained}", "features_images=200")


def test_every_block_and_token_is_measured(trained: Path, found: dict[str, Any]) -> None:
    assert (found["train_images"], found["images"], found["classes"]) == (200, 364, 10)
    for state in ("trained", "untrained"):
        assert set(found[state]) == {"class_token", "mean_patch"}
        for shares in found[state].values():
            assert list(shares) == ["knn_10", "knn_20", "knn_100", "linear"]
            assert all(len(by_block) == 2 for by_block in shares.values())
    # Of 10 classes even the features of a model of a few steps tell more than chance.
    assert min(found["trained"]["class_token"]["linear"]) > 0.3
    assert found["trained"] != found["untrained"]
    html = unescape((trained / "analysis" / "report.html").read_text())
    assert '<h2 id="depth">Where do features stop getting better?</h2>' in html
    assert all(line in html for line in depth.describe(found))
    drawn = (trained / "analysis" / "figures" / "depth.svg").read_text()
    assert "364 images of val, classified by 200 of train" in drawn
    assert json.loads((trained / "analysis" / "analysis.json").read_text())["models"][0]["depth"] == found


def test_the_probe_of_the_last_block_is_the_one_made_by_hand(
    trained: Path, digits: Path, tmp_path: Path
) -> None:
    every = analysed(f"checkpoint={trained}", "features_images=null", f"out={tmp_path}", "report=false")
    loaded = load(str(trained), "auto")
    arrays = {}
    with using(loaded.model, loaded.statistics), torch.no_grad():
        for split in ("train", "val"):
            files = sorted((digits / split).rglob("*.png"))
            images = torch.stack([loaded.model.transform(file) for file in files])
            tokens = loaded.model.forward_features(images)
            arrays[split] = tokens[:, 0].numpy(), np.array([int(file.parent.name) for file in files])
    order = np.random.default_rng(1).permutation(len(arrays["train"][1]))
    features, targets = (part[order] for part in arrays["train"])
    by_hand = (fit_linear_probe(features, targets).predict(arrays["val"][0]) == arrays["val"][1]).mean()
    # Another order of the images holds out others, so the chosen regularisation may differ.
    assert every["trained"]["class_token"]["linear"][-1] == pytest.approx(by_hand, abs=0.03)


def test_workers_and_the_size_of_batches_change_nothing(
    trained: Path, found: dict[str, Any], tmp_path: Path
) -> None:
    options = ["data.workers=2", "eval_batch_size=64", "features_images=200", "report=false"]
    again = analysed(f"checkpoint={trained}", f"out={tmp_path}", *options)
    for kind, shares in found["trained"].items():
        for name, by_block in shares.items():
            assert again["trained"][kind][name] == pytest.approx(by_block, abs=2 / 364)


def test_without_probes_and_with_few_images(trained: Path, tmp_path: Path) -> None:
    few = [f"checkpoint={trained}", f"out={tmp_path}", "features_images=15", "features_eval_images=20"]
    measured = analysed(*few, "features_probe=false")
    assert list(measured["trained"]["mean_patch"]) == ["knn_10"]
    assert (measured["train_images"], measured["images"]) == (15, 20)


def test_data_that_can_not_be_used(trained: Path, digits: Path, image_folder: Path, tmp_path: Path) -> None:
    model = ["model=timm:vit_tiny_patch16_224", "data=imagefolder", f"out={tmp_path / 'out'}"]
    model += ["report=false", "collapse.images=1"]
    odd = shutil.copytree(image_folder, tmp_path / "odd")
    (odd / "val" / "ant").rename(odd / "val" / "aunt")
    with pytest.raises(DataError, match=r"unknown to the model: aunt \(nearest: ant\)|aunt"):
        analysed(*model, f"data.root={odd}")
    one = tmp_path / "one"
    for split in ("train", "val"):
        shutil.copytree(image_folder / "train" / "ant", one / split / "ant")
    with pytest.raises(DataError, match="has one class; features=true needs two or more"):
        analysed(*model, f"data.root={one}")
    for number in range(3, 8):
        for label in ("ant", "bee", "cat"):
            (image_folder / "train" / label / f"{number}.png").unlink()
    with pytest.raises(DataError, match="needs 10 training images, not 9"):
        analysed(*model, f"data.root={image_folder}")
    Image.new("RGB", (8, 8)).save(image_folder / "train" / "ant" / "9.png")
    (image_folder / "val" / "bee" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bee/1\.png"):
        analysed(*model, f"data.root={image_folder}", "features_probe=false")


def test_what_is_said() -> None:
    shares = {"knn_20": [0.2, 0.3], "linear": [0.5, 0.88, 0.9, 0.89, 0.7]}
    fresh = {"knn_20": [0.2, 0.3], "linear": [0.1, 0.35, 0.2, 0.1, 0.1]}
    measured = {"images": 100, "trained": {"class_token": shares}, "untrained": {"class_token": fresh}}
    (said,) = depth.describe(measured)
    assert said == (
        "Features of the class token, linear probe: the accuracy is highest at block 2 (0.900), and 0.700 at "
        "the last block. Block 1 is the first within one standard error (0.030) of the highest. The highest "
        "of the untrained model is 0.350."
    )
    assert not re.search("linear", depth.describe(_without_linear(measured))[0])


def _without_linear(measured: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value if key == "images" else {"class_token": {"knn_20": value["class_token"]["knn_20"]}}
        for key, value in measured.items()
    }
