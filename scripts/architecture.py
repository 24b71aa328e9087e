"""Draw docs/figures/floors.svg and write docs/files.md from the code: python -m scripts.architecture

The floors come from the import contract in pyproject.toml, and the arrows from the imports. The question that
each room answers comes from the tree in docs/architecture.md, and the line of each file from its docstring.
"""

from __future__ import annotations

import argparse
import ast
import re
import tomllib
from html import escape
from pathlib import Path
from textwrap import wrap

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deepvit_train"
PICTURE = ROOT / "docs" / "figures" / "floors.svg"
FILES = ROOT / "docs" / "files.md"

Place = tuple[int, int]  # x and y of a point, from the picture's upper left corner

WIDTH, BOX, HEIGHT, GAP, STEP = 1160, 230, 64, 60, 112
COLOURS = ("#dbe7f5", "#e3f0dd", "#fbeccb", "#f6dcd3", "#e7e0f2", "#d9efee", "#f3e6ee", "#e9e9e2", "#dfe3ea")


def floors() -> list[list[str]]:
    """Return the rooms of each floor from the top, as the import contract in pyproject.toml has them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [re.split(r"\s*[|:]\s*", layer) for layer in layers]


def rooms() -> set[str]:
    """Return the folders and top modules of the package on the disk, as the contract names them."""
    folders = {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}
    return folders | {module.stem for module in PACKAGE.glob("*.py")} - {"__init__"}


def questions(page: Path) -> dict[str, str]:
    """Return the rooms in the tree of a page, each with its question: 'training' and 'what happens ...?'.

    Raises ValueError for a page without such a tree.
    """
    tree = re.search(r"^( *)deepvit_train/\n((?:\1 +\S.*\n)+)", page.read_text(), flags=re.MULTILINE)
    if tree is None:
        raise ValueError(f"{page}: no tree that begins with 'deepvit_train/'")
    return dict(re.findall(rf"^{tree[1]}  (\w+)(?:/|\.py) +(\S.*)$", tree[2], flags=re.MULTILINE))


def arrows() -> set[tuple[str, str]]:
    """Return which room imports from which, without arrows that a longer way through other rooms implies."""
    graph = grimp.build_graph(PACKAGE.name, cache_dir=None)
    level = {room: floor for floor, names in enumerate(floors()) for room in names}
    uses: dict[str, set[str]] = {room: set() for room in level}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            above, below = (name.partition(".")[2].partition(".")[0] for name in (module, imported))
            if above in level and below in level and level[above] < level[below]:
                uses[above].add(below)
    reached: dict[str, set[str]] = {}
    for room in sorted(level, key=lambda name: -level[name]):
        reached[room] = uses[room].union(*(reached[each] for each in uses[room]))
    return {
        (room, each)
        for room, used in uses.items()
        for each in used
        if not any(each in reached[other] for other in used - {each})
    }


def picture() -> str:
    """Return the floors as SVG: a box for each room, and an arrow from each room to those it imports from."""
    plan, asks = floors(), questions(ROOT / "docs" / "architecture.md")
    places = {
        room: (round(WIDTH / 2 + (place - (len(names) - 1) / 2) * (BOX + GAP)), 20 + floor * STEP)
        for floor, names in enumerate(plan)
        for place, room in enumerate(names)
    }
    parts = [_arrow(start, end) for start, end in _ends(places)]
    for floor, names in enumerate(plan):
        for room in names:
            suffix = "/" if (PACKAGE / room).is_dir() else ".py"
            parts.append(_box(room + suffix, asks[room], places[room], COLOURS[floor % len(COLOURS)]))
    height = 40 + (len(plan) - 1) * STEP + HEIGHT
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif">',
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#666"/></marker>',
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _ends(places: dict[str, Place]) -> list[tuple[Place, Place]]:
    """Return where each arrow starts and ends. They are spread along the boxes, so that few of them cross."""
    found = sorted(arrows())
    leaving = {
        room: sorted((below for above, below in found if above == room), key=places.__getitem__)
        for room in places
    }
    arriving = {
        room: sorted((above for above, below in found if below == room), key=places.__getitem__)
        for room in places
    }

    def spread(room: str, others: list[str], other: str) -> int:
        return round(places[room][0] + ((others.index(other) + 1) / (len(others) + 1) - 0.5) * BOX)

    return [
        (
            (spread(above, leaving[above], below), places[above][1] + HEIGHT),
            (spread(below, arriving[below], above), places[below][1]),
        )
        for above, below in found
    ]


def _arrow(start: Place, end: Place) -> str:
    bend = (end[1] - start[1]) // 2
    dashes = ' stroke-dasharray="6 4"' if end[1] - start[1] > STEP else ""
    return (
        f'<path d="M{start[0]} {start[1]} C{start[0]} {start[1] + bend} {end[0]} {end[1] - bend} '
        f'{end[0]} {end[1]}" fill="none" stroke="#666" stroke-width="1.3"{dashes} marker-end="url(#head)"/>'
    )


def _box(name: str, question: str, place: Place, colour: str) -> str:
    x, y = place
    lines = [
        f'<text x="{x}" y="{y + 40 + 15 * number}" text-anchor="middle" font-size="12.5" fill="#333">'
        f"{escape(line)}</text>"
        for number, line in enumerate(wrap(question, 30))
    ]
    return "\n".join(
        [
            f'<rect x="{x - BOX // 2}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="6" fill="{colour}" '
            'stroke="#888"/>',
            f'<text x="{x}" y="{y + 21}" text-anchor="middle" font-family="monospace" font-size="16" '
            f'font-weight="bold" fill="#222">{escape(name)}</text>',
            *lines,
        ]
    )


def listing() -> str:
    """Return docs/files.md: a table for each folder of the package, with the first sentence of each file."""
    folders = sorted({module.parent for module in PACKAGE.rglob("*.py")})
    names = [f"{folder.relative_to(ROOT)}/" for folder in folders]
    parts = ["# Every file in one line\n"]
    parts += [f"- [{name}](#{name.replace('/', '')})" for name in names]
    parts.append(
        "\n`python -m scripts.architecture` writes this page from the first sentence of each file. "
        "[The architecture page](architecture.md)\nsays how the folders fit together."
    )
    for folder, name in zip(folders, names, strict=True):
        parts.append(f"\n## {name}\n\n| file | |\n|---|---|")
        for module in sorted(folder.glob("*.py")):
            summary = _first_sentence(module)
            if module.name != "__init__.py":
                parts.append(f"| [{module.name}](../{module.relative_to(ROOT)}) | {summary} |")
    return "\n".join(parts) + "\n"


def _first_sentence(module: Path) -> str:
    text = ast.get_docstring(ast.parse(module.read_text())) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?]) (?=[A-Z])", paragraph)[0].replace("|", r"\|")


def main() -> None:
    """Write the picture and the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PICTURE.write_text(picture())
    FILES.write_text(listing())


if __name__ == "__main__":
    main()
