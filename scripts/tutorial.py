"""Make the photographs of docs/tutorial.md, run its commands on them, and draw its pictures.

    python -m scripts.tutorial photographs FOLDER    400 photographs in five class folders
    python -m scripts.tutorial pictures FOLDER       the commands in FOLDER, then docs/figures/tutorial-*.png

The photographs are parts of six pictures that scikit-learn and scikit-image bundle.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from scripts.photographs import SOURCES, sources

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
FIGURES = ROOT / "docs" / "figures"
# The pictures that each class is cut from.
CLASSES = {
    "cat": ["chelsea"],
    "coffee": ["coffee"],
    "flower": ["flower"],
    "motorcycle": ["motorcycle_left", "motorcycle_right"],
    "temple": ["china"],
}
SIZE = (320, 240)  # of a photograph, pixels
COUNT = 400


def write_photographs(root: Path, count: int = COUNT) -> None:
    """Write photographs to root/CLASS/IMG_0001.jpg, as many of each class. The same ones every time."""
    rng = np.random.default_rng(0)
    pictures = dict(zip([*SOURCES, "china", "flower"], sources(), strict=True))
    for name, from_which in CLASSES.items():
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(count // len(CLASSES)):
            picture = pictures[from_which[number % len(from_which)]]
            # A part of 30 to 90 % of the largest possible width, anywhere in the picture.
            scale = min(picture.width / SIZE[0], picture.height / SIZE[1]) * rng.uniform(0.3, 0.9)
            width, height = scale * SIZE[0], scale * SIZE[1]
            left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
            box = (left, top, left + width, top + height)
            part = picture.resize(SIZE, Image.Resampling.LANCZOS, box=box)
            part.save(folder / f"IMG_{number + 1:04d}.jpg", quality=88)


def commands() -> list[list[str]]:
    """Return the commands of the page in order, as words."""
    text = PAGE.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}(deepvit-.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def run_commands(folder: Path) -> None:
    """Run the commands of the page in a folder, each as `python -m deepvit_train.cli`. They must succeed."""
    for program, *words in commands():
        print("$", shlex.join([program, *words]), flush=True)
        command = [sys.executable, "-m", "deepvit_train.cli", program.removeprefix("deepvit-"), *words]
        subprocess.run(command, cwd=folder, check=True)


def draw(folder: Path) -> None:
    """Draw the pictures of the page from what its commands left in a folder."""
    photographs = [sorted((folder / "photographs" / name).iterdir())[:4] for name in CLASSES]
    _save(_grid(photographs, list(CLASSES)), "photographs")
    _save(_curves(folder / "runs" / "photographs" / "metrics.jsonl"), "curves")
    overlays = sorted((folder / "attention").iterdir())
    chosen = [overlays[number * len(overlays) // 5] for number in range(5)]
    _save(_grid([chosen], [""]), "attention")
    seen = folder / "runs" / "photographs" / "analysis" / "figures" / "class_attention.png"
    with Image.open(seen) as picture:
        first = picture.crop((0, 0, picture.width, picture.height * 48 // 100))
        _write(_shrink(first.convert("RGB"), 640), "report")


def _grid(rows: list[list[Path]], names: list[str]) -> Figure:
    wide = max(map(len, rows))
    figure = Figure(figsize=(1.6 * wide, 1.25 * len(rows)), layout="constrained")
    for axes, files, name in zip(figure.subplots(len(rows), wide, squeeze=False), rows, names, strict=True):
        axes[0].set_ylabel(name, fontsize=8)
        for axis, file in zip(axes, files, strict=True):
            with Image.open(file) as picture:
                axis.imshow(np.asarray(_shrink(picture.convert("RGB"), 160)))
            axis.set(xticks=[], yticks=[])
    return figure


def _curves(file: Path) -> Figure:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axis, names in ((loss, ("train/loss", "val/loss")), (accuracy, ("val/top1",))):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set_xlabel("step")
        axis.legend(frameon=False)
        axis.grid(alpha=0.3)
    return figure


def _shrink(picture: Image.Image, width: int) -> Image.Image:
    return picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)


def _save(figure: Figure, name: str) -> None:
    figure.savefig(drawn := io.BytesIO(), dpi=80)
    with Image.open(drawn) as picture:
        _write(picture.convert("RGB"), name)


def _write(picture: Image.Image, name: str) -> None:
    """Write a picture of the page with 64 colours, so that the repository stays small."""
    few = picture.quantize(64, dither=Image.Dither.NONE)
    few.save(FIGURES / f"tutorial-{name}.png", optimize=True)


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["photographs", "pictures"])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    given = parser.parse_args()
    if given.what == "photographs":
        write_photographs(given.folder)
        return
    write_photographs(given.folder / "photographs")
    run_commands(given.folder)
    draw(given.folder)


if __name__ == "__main__":
    main()
