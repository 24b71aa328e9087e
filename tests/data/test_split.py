"""data.val_share makes train and val of one folder: the same ones wherever and whenever it is read."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.config.compose import compose_command
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.split import drawn_for_val
from deepvit_train.error import ConfigError, DataError
from tests.conftest import QUICK, Command

COUNTS = {"ant": 12, "bee": 12, "cat": 2, "dog": 1}
# Those of ant and bee that are val at 0.25. Another rule would give every user other validation images.
VAL = {
    "ant/p0_1.png",
    "ant/p2_5.png",
    "ant/p3_6.png",
    "ant/p5_10.png",
    "ant/p5_11.png",
    "bee/p3_7.png",
    "bee/p4_8.png",
    "bee/p4_9.png",
    "bee/p5_11.png",
}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """ROOT/CLASS/IMAGE with two images of each patient p0, p1, ..., who has images in two classes."""
    root = tmp_path / "flat"
    for name, count in COUNTS.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.full((8, 8, 3), number, np.uint8)
            Image.fromarray(pixels).save(root / name / f"p{number // 2}_{number}.png")
    return root


def parts(root: Path, *more: str, share: float = 0.25) -> dict[str, ImageIndex]:
    given = [f"data.root={root}", f"data.val_share={share}", "data=imagefolder", "model=digits", *more]
    data = compose_command("train", given).data
    return {split: open_split(data, split) for split in ("train", "val")}


def names(index: ImageIndex) -> list[str]:
    return [
        f"{index.classes[target]}/{Path(path).name}"
        for path, target in zip(index.paths_in_class(), index.targets, strict=True)
    ]


def draw(path: str) -> float:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little") / 2**64


def test_a_path_decides_alone(flat: Path) -> None:
    found = parts(flat)
    expected = {f"{name}/p{n // 2}_{n}.png" for name in ("ant", "bee") for n in range(12)}
    below = {path for path in expected if draw(path) < 0.25}
    val = {path for path in names(found["val"]) if path.startswith(("ant", "bee"))}
    assert val == below == VAL
    every = names(found["train"]) + names(found["val"])
    assert len(every) == len(set(every)) == sum(COUNTS.values())


def test_each_side_has_an_image_of_each_class_of_two(flat: Path) -> None:
    for share in (0.01, 0.25, 0.99):
        found = parts(flat, share=share)
        counts = {
            split: Counter(name.split("/")[0] for name in names(index)) for split, index in found.items()
        }
        assert all(counts["val"][name] for name in ("ant", "bee", "cat"))
        assert all(counts["train"][name] for name in COUNTS)
        assert counts["val"]["dog"] == 0  # its only image is trained on
        assert found["val"].classes == list(COUNTS)


def test_added_images_move_no_other(flat: Path) -> None:
    before = {split: set(names(index)) for split, index in parts(flat).items()}
    for number in range(100, 140):
        shutil.copy(flat / "ant" / "p0_0.png", flat / "ant" / f"p{number}_{number}.png")
    (flat / "eel").mkdir()
    shutil.copy(flat / "ant" / "p0_0.png", flat / "eel")
    after = {split: set(names(index)) for split, index in parts(flat).items()}
    assert all(before[split] < after[split] for split in before)


def test_a_moved_folder_and_tar_files_are_split_alike(flat: Path, tmp_path: Path) -> None:
    before = {split: names(index) for split, index in parts(flat).items()}
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "all.tar", "w") as archive:
        archive.add(flat, "some/where")
    (tmp_path / "by_class").mkdir()
    for name in COUNTS:
        with tarfile.open(tmp_path / "by_class" / f"{name}.tar", "w") as archive:
            for file in sorted((flat / name).iterdir()):
                archive.add(file, file.name)
    for packed in ("shards", "by_class"):
        found = parts(tmp_path / packed, "data=tar")
        assert {split: names(index) for split, index in found.items()} == before
        for index in found.values():
            for image, path in enumerate(index.paths_in_class()):
                assert index.read(image, 10**6) == (flat / path).read_bytes()
    shutil.move(flat, tmp_path / "moved")
    assert {split: names(index) for split, index in parts(tmp_path / "moved").items()} == before


def test_groups_stay_together_over_all_classes(flat: Path) -> None:
    found = parts(flat, r"data.group_by=/(p\d+)_")
    patients = {
        split: {re.findall(r"p\d+", name)[0] for name in names(index)} for split, index in found.items()
    }
    assert not patients["train"] & patients["val"]
    assert patients["train"] | patients["val"] == {f"p{number}" for number in range(6)}
    assert patients["val"] >= {patient for patient in patients["val"] if draw(patient) < 0.25}
    alone = parts(flat)
    assert {index.digest for index in found.values()}.isdisjoint(index.digest for index in alone.values())
    with pytest.raises(
        DataError, match=r"data.group_by=\(x\): finds a group in no path of .*flat, such as ant/"
    ):
        parts(flat, "data.group_by=(x)")


def test_draws_of_groups_and_classes() -> None:
    draws = np.array([1, 1, 2, 9, 9, 3], np.uint64) << np.uint64(59)  # of 32
    # The first class lies below the share, the second on both sides, the third is one group.
    targets = np.array([0, 0, 0, 1, 1, 1])
    assert drawn_for_val(draws, targets, 3, 0.2).tolist() == [True, True, False, False, False, True]
    assert drawn_for_val(draws, targets, 3, 0.01).tolist() == [True, True, False, False, False, True]
    assert drawn_for_val(draws[:2], targets[:2], 1, 0.9).tolist() == [False, False]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["data.val_share=0"], "must be greater than 0"),
        (["data.val_share=1"], "must be less than 1"),
        (
            ["data.val_share=0.1", "data.split=test"],
            "data.split=test: data.val_share makes train and val alone",
        ),
        (["data.group_by=(x)"], "is for data.val_share"),
        (["data.val_share=0.1", "data.group_by=(x"], "not a regular expression"),
        (["data.val_share=0.1", "data.group_by=x"], r"has no group; nearest: data.group_by=\(x\)"),
    ],
)
def test_what_cannot_be_is_refused(typed: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose_command("train", ["data.root=/x", *typed])


def test_a_folder_that_is_split_already_is_not_split_again(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds train and val already"):
        parts(image_folder)
    assert len(parts(image_folder / "train")["train"]) > 0
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            archive.add(image_folder / split, split)
    with pytest.raises(DataError, match="holds train and val already"):
        parts(tmp_path, "data=tar")
    (tmp_path / "val.tar").unlink()
    assert len(parts(tmp_path, "data=tar")["train"]) > 0


def test_the_key_is_named_where_a_folder_needs_it(flat: Path, call: Command) -> None:
    said = call("train", f"data.root={flat}", "model=digits")
    assert said.returncode == 4
    assert f"data.val_share=0.1 makes train and val of images in {flat}/CLASS/" in said.stderr
    assert "data.val_share=0.1 makes" in call("data-check", str(flat), "timing=false").stdout
    (flat / "train").mkdir()
    for name in COUNTS:
        (flat / name).rename(flat / "train" / name)
    said = call("train", f"data.root={flat}", "model=digits")
    assert f"data.root={flat}/train data.val_share=0.1 splits the images of train" in said.stderr


def test_the_check_counts_images_without_a_group(flat: Path, call: Command) -> None:
    given = [str(flat), "data.val_share=0.25", "timing=false", "data.workers=0", "model=digits"]
    warned = json.loads(call("data-check", *given, "data.group_by=ant/(p)").stdout.splitlines()[-1])[
        "warnings"
    ]
    assert warned == [
        "data.group_by=ant/(p): finds a group in all but 15 of 27 paths, which are alone, "
        "such as bee/p0_0.png"
    ]
    assert not json.loads(call("data-check", *given, "data.group_by=/(p)").stdout.splitlines()[-1])[
        "warnings"
    ]


@pytest.mark.runs
def test_every_command_sees_the_same_split(flat: Path, call: Command) -> None:
    given = ["data=imagefolder", f"data.root={flat}", "data.val_share=0.25", r"data.group_by=/(p\d+)_"]
    learn = [*QUICK, *given, "trainer.batch_size=4", "run_dir=r"]
    assert call("train", *learn).returncode == 0
    images = json.loads(Path("r/checkpoints/last/state.json").read_text())["images"]
    found = parts(flat, r"data.group_by=/(p\d+)_")
    for split, index in found.items():
        assert (images[split]["images"], images[split]["digest"]) == (len(index), index.digest)

    # The run's own data, with nothing said of it.
    for split, index in found.items():
        report = json.loads(call("eval", "r", "threads=1", f"data.split={split}").stdout.splitlines()[-1])
        assert (report["images"], report["val_share"]) == (len(index), 0.25)
    out = call("predict", "r", "threads=1", "out=p.csv")
    assert json.loads(out.stdout.splitlines()[-1])["images"] == len(found["val"])
    assert call("export", "r", "out=e", "format=pt2", "threads=1").returncode == 0
    assert json.loads(Path("e/model.json").read_text())["digests"]["data"] == found["val"].digest
    assert call("analyze", "r", "accuracy=true", "report=false", "threads=1").returncode == 0
    (model,) = json.loads(Path("r/analysis/analysis.json").read_text())["models"]
    assert model["accuracy"]["calibrated"]["images"] == len(found["val"])
    checked = call("data-check", str(flat), *given[2:], "timing=false")
    splits = json.loads(checked.stdout.splitlines()[-1])["splits"]
    assert {split: statistics["images"] for split, statistics in splits.items()} == {
        split: len(index) for split, index in found.items()
    }

    # Its folder, split otherwise; the run goes on after images were added, and with no other split.
    other = call("eval", "r", "data=imagefolder", f"data.root={flat}", "data.val_share=0.1")
    assert (other.returncode, "nearest: data.val_share=0.25" in other.stderr) == (2, True)
    for number in range(20, 30):
        shutil.copy(flat / "ant" / "p0_0.png", flat / "ant" / f"p{number}_{number}.png")
    on = call("train", *learn, "trainer.epochs=3")
    assert (on.returncode, "flat (val): other images than at the checkpoint" in on.stdout) == (0, True), (
        on.stderr
    )
    assert "removed" not in on.stdout
    moved = call("train", *learn, "trainer.epochs=4", "data.val_share=0.3")
    assert (moved.returncode, "data.val_share" in moved.stderr) == (2, True)
