"""Check data sets: every fault is found and named, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.config.compose import compose_command
from deepvit_train.data.check import (
    Split,
    compare_classes,
    duplicates,
    examine_split,
    list_split,
    statistics_of,
)
from deepvit_train.data.decode import Limits
from deepvit_train.error import DataError
from scripts.photographs import photographs

LIMITS = Limits(max_bytes=10**7, max_pixels=10**6)


def checked(root: Path, workers: int = 0, kind: str = "imagefolder") -> tuple[list[Split], list[str]]:
    data = compose_command("data-check", [f"root={root}", f"data={kind}"]).data
    splits = [list_split(root, data, name) for name in ("train", "val")]
    seen: list[int] = []
    for split in splits:
        examine_split(split, LIMITS, workers, seen.append)
    assert sum(seen) == sum(len(split.index) for split in splits)
    errors = [error for split in splits for error in split.errors]
    return splits, errors + compare_classes(*splits) + duplicates(*splits)


def test_a_good_data_set_has_no_errors(image_folder: Path) -> None:
    splits, errors = checked(image_folder)
    assert not errors
    assert not splits[0].warnings
    assert statistics_of(splits[0]) | {"gib": 0, "bytes": 0} == {
        "images": 24,
        "bad": 0,
        "classes": 3,
        "images_a_class": {"min": 8, "median": 8, "max": 8},
        "kinds": {"PNG RGB": 24},
        "left_out": {},
        "values": {},
        "gib": 0,
        "bytes": 0,
        "width": {"min": 24, "median": 24, "max": 24},
        "height": {"min": 20, "median": 20, "max": 20},
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_everything_wrong_is_named(image_folder: Path, workers: int) -> None:
    train, val = image_folder / "train", image_folder / "val"
    for number in range(70):  # more than one process gets at a time
        pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(pixels).save(train / "ant" / f"more{number}.png")
    (train / "bee" / "2.png").write_bytes(b"")
    whole = (train / "bee" / "3.png").read_bytes()
    (train / "bee" / "3.png").write_bytes(whole[: len(whole) // 2])
    (train / "bee" / "text.jpg").write_text("no image")
    Image.new("L", (1001, 1000)).save(train / "cat" / "huge.png")
    (val / "dog").mkdir()
    (train / "empty").mkdir()
    (train / "bee" / "out.png").symlink_to("/etc/hostname")
    shutil.copy(train / "ant" / "5.png", val / "cat" / "twin.jpg")
    photograph = next(photographs(1))
    photograph.save(train / "ant" / "damaged.jpg", quality=90)
    damaged = bytearray((train / "ant" / "damaged.jpg").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 2] = b"\xff\xd0"  # a marker where none belongs
    (train / "ant" / "damaged.jpg").write_bytes(damaged)

    flipped = bytearray((train / "ant" / "0.png").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (train / "ant" / "0.png").write_bytes(flipped)

    splits, errors = checked(image_folder, workers)
    text = "\n".join(errors)
    for message in (
        f"{train}/cat/huge.png: 1001 x 1000 pixels, more than data.max_pixels",
        f"{train}/empty: no image in this class",
        f"{val}/dog: no image in this class",
        "class dog: in val, not in train",
        "class empty: in train, not in val",
        f"{val}/cat/twin.jpg: the same content as {train}/ant/5.png",
        f"{train}/bee/out.png: a link that leads out of {image_folder}",
    ):
        assert message in text
    assert len(errors) == 7
    (train / "bee" / "out.png").unlink()
    splits, errors = checked(image_folder, workers)
    text = "\n".join(errors)
    for name, message in (("2.png", "an empty file"), ("3.png", ""), ("text.jpg", "cannot identify")):
        assert f"{train}/bee/{name}: {message}" in text
    assert len(errors) == 9
    assert len(splits[0].warnings) == 2
    for name, message in (("0.png", "wrong checksum of b'IDAT'"), ("damaged.jpg", "Corrupt JPEG data")):
        assert any(
            line.startswith(f"{train}/ant/{name}: readable, but damaged ({message}")
            for line in splits[0].warnings
        )
    assert splits[0].kinds == {"PNG RGB": 24 - 2 + 70, "JPEG RGB": 1}


def test_a_data_set_that_goes_away_is_one_error_and_not_one_for_each_image(image_folder: Path) -> None:
    config = compose_command("train", ["data=imagefolder", f"data.root={image_folder}"])
    split = list_split(image_folder, config.data, "train")
    image_folder.rename(image_folder.with_name("away"))
    with pytest.raises(DataError, match="is gone since its images were listed"):
        examine_split(split, LIMITS, 0, lambda count: None)


def test_a_twin_that_vanishes_is_an_error(image_folder: Path) -> None:
    twin = image_folder / "train" / "ant" / "5.png"
    shutil.copy(twin, image_folder / "val" / "cat" / "twin.png")
    splits, errors = checked(image_folder)
    assert len(errors) == 1
    twin.unlink()
    assert duplicates(*splits) == [f"{twin}: No such file or directory"]


def test_a_missing_split_is_an_error(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "val")
    splits, errors = checked(image_folder)
    assert [error.split(":")[0] for error in errors] == [f"{image_folder}/val"]
    assert len(splits[0].index) == 24
