"""ImageNet's test sets are read in the layouts that they are published in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.data.imagenet import (
    C_CORRUPTIONS,
    find_corrupted,
    imagenet_classes,
    known_part,
    open_folder,
)
from deepvit_train.error import DataError
from deepvit_train.evaluation.robustness import ALEXNET_ERRORS


def put(folder: Path, *names: str) -> Path:
    """Put a picture of noise under each name in a folder."""
    rng = np.random.default_rng(len(names))
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(file, format="PNG")
    return folder


def test_classes_are_sorted_wordnet_ids() -> None:
    names = imagenet_classes()
    assert (len(names), names[0], names[-1]) == (1000, "n01440764", "n15075141")
    assert names == sorted(names)


def test_numbers_of_v2_are_places_among_the_classes(tmp_path: Path) -> None:
    index = open_folder("suite.v2", str(put(tmp_path / "v2", "0/a.jpeg", "10/b.jpeg", "9/c.jpeg")), False)
    names = imagenet_classes()
    found = {Path(index.path(image)).parent.name: index.classes[index.targets[image]] for image in range(3)}
    assert found == {"0": names[0], "10": names[10], "9": names[9]}
    assert index.classes == sorted(index.classes)


def test_only_the_classes_that_a_model_knows(tmp_path: Path) -> None:
    names = imagenet_classes()
    folder = put(tmp_path / "r", *(f"{names[place]}/{each}.jpg" for place in (3, 4, 8) for each in "ab"))
    index = open_folder("suite.r", str(folder), False)
    part = known_part(index, [names[8], names[3], names[900]])
    assert part.classes == [names[3], names[8]]
    assert [Path(part.path(image)).relative_to(folder).as_posix() for image in range(4)] == [
        f"{names[3]}/a.jpg",
        f"{names[3]}/b.jpg",
        f"{names[8]}/a.jpg",
        f"{names[8]}/b.jpg",
    ]
    assert part.targets.tolist() == [0, 0, 1, 1]
    assert part.digest == index.digest
    assert known_part(index, names) is index
    with pytest.raises(DataError, match="the model knows none of its 3 classes"):
        known_part(index, [names[0]])


@pytest.mark.parametrize("grouped", [False, True])
def test_c_lies_in_folders_or_in_groups_of_folders(tmp_path: Path, grouped: bool) -> None:
    group = "weather/" if grouped else ""
    put(tmp_path, *(f"{group}fog/{severity}/n01440764/a.JPEG" for severity in (1, 3)), "note/1/x/a.JPEG")
    found = find_corrupted(str(tmp_path))
    assert found == {"fog": {each: tmp_path / f"{group}fog" / str(each) for each in (1, 3)}}


def test_the_corruptions_of_the_error_are_all_but_the_extra_ones() -> None:
    every = [name for group, names in C_CORRUPTIONS.items() if group != "extra" for name in names]
    assert every == list(ALEXNET_ERRORS)


def test_folders_that_are_no_such_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"suite\.a=.*nowhere: no such folder"):
        open_folder("suite.a", str(tmp_path / "nowhere"), False)
    put(tmp_path / "wrapped", "imagenet-a/n01440764/a.jpg")
    with pytest.raises(DataError, match="imagenet-a is no class of ImageNet-1k"):
        open_folder("suite.a", str(tmp_path / "wrapped"), False)
    with pytest.raises(DataError, match=r"holds no CORRUPTION/SEVERITY/CLASS"):
        find_corrupted(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        find_corrupted(str(tmp_path / "nowhere"))
