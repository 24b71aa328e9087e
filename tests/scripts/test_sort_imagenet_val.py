"""Sort validation images by each kind of label file, and refuse files that do not fit the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from scripts.sort_imagenet_val import main

CLASSES = {1: "n01751748", 2: "n09193705", 3: "n01751748"}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    folder = tmp_path / "val"
    folder.mkdir()
    for number in CLASSES:
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_text(str(number))
    return folder


@pytest.mark.parametrize("form", ["kaggle", "ids", "numbers", "devkit"])
def test_every_kind_of_label_file(
    flat: Path, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {number: f"ILSVRC2012_val_{number:08d}" for number in CLASSES}
    file = tmp_path / "labels.txt"
    if form == "kaggle":
        lines = [
            "ImageId,PredictionString",
            *[f"{names[n]},{c} 1 2 3 4 {c} 5 6 7 8" for n, c in CLASSES.items()],
        ]
    elif form == "ids":
        lines = [f"{names[n]}.JPEG {c}" for n, c in CLASSES.items()]
    elif form == "numbers":  # the 65th and 970th WordNet ids in their order
        lines = [f"{names[n]}.JPEG {({'n01751748': 65, 'n09193705': 970})[c]}" for n, c in CLASSES.items()]
    else:
        kinds = [("ILSVRC2012_ID", float), ("WNID", object)]
        synsets = np.array([(490, "n01751748"), (361, "n09193705")], dtype=kinds)
        savemat(tmp_path / "meta.mat", {"synsets": synsets})
        lines = ["490", "361", "490"]
    file.write_text("\n".join(lines) + "\n")
    assert main([str(flat), str(file)]) == 0
    found = {path.relative_to(flat).as_posix(): path.read_text() for path in flat.glob("*/*")}
    assert found == {f"{label}/{names[number]}.JPEG": str(number) for number, label in CLASSES.items()}
    capsys.readouterr()
    assert main([str(flat), str(file)]) == 0
    assert capsys.readouterr().out.startswith("0 images moved; 3 images in 2 class folders")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["ILSVRC2012_val_00000001.JPEG n01751748"], "no label for 2 files"),
        ([f"ILSVRC2012_val_{n:08d}.JPEG n01751748" for n in range(1, 5)], "1 labelled images are missing"),
        ([f"ILSVRC2012_val_{n:08d}.JPEG snake" for n in CLASSES], "'snake' is neither"),
        (["1", "2", "3"], "meta.mat"),
    ],
)
def test_nothing_moves_where_labels_and_images_differ(
    flat: Path, lines: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(flat.rglob("*"))
    (tmp_path / "labels.txt").write_text("\n".join(lines))
    assert main([str(flat), str(tmp_path / "labels.txt")]) == 4
    assert told in capsys.readouterr().err
    assert sorted(flat.rglob("*")) == before
