"""Show that the architecture page fits the code: its tree, its picture and its list of files."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from scripts import architecture

ROOT = architecture.ROOT
PAGE = ROOT / "docs" / "architecture.md"
# Folders that hold parts of the project. Those beneath them stand in the tree as well.
TOP = ("deepvit_train", "configs", "tests", "scripts", "docs")


def folders_in(page: Path) -> set[str]:
    """The folders in the tree of a page, as paths: 'deepvit_train/models/importer'."""
    tree = re.search(r"^    deepvit_train/\n(?: {4,}\S.*\n)+", page.read_text(), flags=re.MULTILINE)
    assert tree is not None, f"{page}: no tree"
    above: list[tuple[int, str]] = []
    found = set()
    for indent, name in re.findall(r"^( +)(\w+)/", tree[0], flags=re.MULTILINE):
        while above and above[-1][0] >= len(indent):
            above.pop()
        path = f"{above[-1][1]}/{name}" if above else name
        above.append((len(indent), path))
        found.add(path)
    return found


def test_every_folder_is_in_the_tree_and_nothing_else() -> None:
    packages = {init.parent for init in architecture.PACKAGE.rglob("__init__.py")}
    others = {each for top in ("configs", "docs") for each in (ROOT / top).iterdir() if each.is_dir()}
    expected = {str(folder.relative_to(ROOT)) for folder in packages | others} | set(TOP)
    shown = folders_in(PAGE)
    assert not expected - shown, "folders missing in the tree of docs/architecture.md"
    assert not [path for path in shown if not (ROOT / path).is_dir()], "in the tree, and not on the disk"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_every_room_has_its_question(page: str) -> None:
    asked = architecture.questions(ROOT / page)
    assert set(asked) == architecture.rooms()
    assert asked == architecture.questions(PAGE)
    assert all(question.endswith("?") for question in asked.values())


def test_the_folders_of_the_tests_are_those_of_the_package() -> None:
    described = {path.partition("/")[2] for path in folders_in(PAGE) if path.startswith("tests/")}
    present = {each.parent.name for each in (ROOT / "tests").glob("*/__init__.py")}
    assert present - architecture.rooms() <= described


def test_the_picture_is_as_wide_as_its_widest_floor() -> None:
    drawn = ElementTree.parse(architecture.PICTURE).getroot()
    width = float(drawn.attrib["viewBox"].split()[2])
    boxes = [element for element in drawn.iter() if element.tag.endswith("rect") and "x" in element.attrib]
    assert len(boxes) == len(architecture.rooms())
    for box in boxes:
        assert float(box.attrib["x"]) >= 0
        assert float(box.attrib["x"]) + float(box.attrib["width"]) <= width


def test_the_picture_has_the_floors_of_the_contract() -> None:
    drawn = ElementTree.parse(architecture.PICTURE).getroot()
    names = {
        element.text: int(element.attrib["y"])
        for element in drawn.iter("{http://www.w3.org/2000/svg}text")
        if element.attrib.get("font-weight") == "bold"
    }
    by_height: dict[int, set[str]] = {}
    for name, height in names.items():
        by_height.setdefault(height, set()).add(re.sub(r"/$|\.py$", "", str(name)))
    assert [by_height[height] for height in sorted(by_height)] == [
        set(floor) for floor in architecture.floors()
    ]


def test_picture_and_list_of_files_are_current() -> None:
    hint = "run `python -m scripts.architecture`"
    assert architecture.PICTURE.read_text() == architecture.picture(), hint
    assert architecture.FILES.read_text() == architecture.listing(), hint
