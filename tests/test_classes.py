"""Orders of class names, against the programs that they belong to; files of names; how lists differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.utils.misc import natural_key
from torchvision.datasets.folder import find_classes

from deepvit_train.classes import TIMM, TORCHVISION, difference, ordered, read_map, read_names
from deepvit_train.error import DataError

NAMES = [
    "10",
    "9",
    "a2",
    "A10",
    "apple",
    "Banana",
    "cherry",
    "Date",
    "éclair",
    "Zebra",
    "n01440764",
    "x1y02z",
]


def test_orders_are_those_of_the_programs(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
    assert ordered(NAMES, TORCHVISION) == find_classes(tmp_path)[0]
    assert ordered(NAMES, TIMM) == sorted(NAMES, key=natural_key)
    assert ordered(["apple", "Banana", "cherry", "Date"], TORCHVISION) == [
        "Banana",
        "Date",
        "apple",
        "cherry",
    ]
    assert ordered(["10", "9", "²"], TIMM)[:2] == ["9", "10"]  # natural_key fails at such a digit


def test_how_lists_differ() -> None:
    known = [str(number) for number in range(12)]
    assert difference(list(reversed(known)), known) == ""
    assert difference(["zero", *known[1:]], known) == "unknown to the model: zero; missing: 0"
    assert difference(known[:4], known) == "missing: 10, 11, 4, 5, 6, ... 3 more"
    assert difference(known[:4], known, subset=True) == ""
    assert difference(["Ant", "bees"], ["ant", "bee"]) == (
        "unknown to the model: Ant (nearest: ant), bees (nearest: bee); missing: ant, bee"
    )


def test_names_that_look_the_same_are_told_apart() -> None:
    said = difference(["cafe\u0301"], ["caf\u00e9"])
    assert said == ("unknown to the model: 'cafe\\u0301' (nearest: 'caf\\xe9'); missing: 'caf\\xe9'")


def test_files_of_names(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(b"\xef\xbb\xbfred one\r\nb: c\r\n\r\n")
    assert read_names(str(file), 2) == ["red one", "b: c"]
    file.write_text("zero: 0\nold dog: dog\n")
    assert read_map(str(file)) == {"zero": "0", "old dog": "dog"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\nb\n", "holds 2 names, but the model has 3 outputs"),
        (b"a\nb\na\n", "names 'a' twice"),
        (b"\xff\n", "not UTF-8 text"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_of_names_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_names(str(file), 3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("zero\n", "'zero' is not of the form 'folder: class'"),
        (": 0\n", "is not of the form"),
        ("a: 0\na: 1\n", "'a' twice"),
    ],
)
def test_a_wrong_class_map_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "map.txt").write_text(content)
    with pytest.raises(DataError, match=said):
        read_map(str(tmp_path / "map.txt"))
