"""Sort the flat ILSVRC2012 validation images into class folders, as ImageFolder wants them.

    python scripts/sort_imagenet_val.py FOLDER LABELS

FOLDER holds ILSVRC2012_val_00000001.JPEG and so on; afterwards FOLDER/n01751748/ILSVRC2012_val_00000001.JPEG.
LABELS is any of the files that name the classes:

    ILSVRC2012_validation_ground_truth.txt   of the development kit; meta.mat beside it gives the classes
    LOC_val_solution.csv                     of Kaggle's copy
    val.txt                                  a line an image: name, then WordNet id or 0..999 in their order

Everything is checked before the first file moves. Run it again after an interruption: it goes on.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from pathlib import Path

WORDNET_ID = re.compile(r"n\d{8}")
IMAGE = "ILSVRC2012_val_{:08d}"


class LabelError(Exception):
    """A label file or folder that can't be used."""


def read_labels(file: Path) -> dict[str, str]:
    """The class of each image: {'ILSVRC2012_val_00000001': 'n01751748', ...}. Raises LabelError."""
    try:
        rows = [row for row in csv.reader(file.read_text().splitlines()) if row]
    except (OSError, UnicodeDecodeError) as error:
        raise LabelError(f"{file}: can't be read ({error})") from None
    if rows and rows[0] == ["ImageId", "PredictionString"]:
        return {image: _checked(file, prediction.split()[0]) for image, prediction in rows[1:]}
    lines = [row[0].split() for row in rows]
    if all(len(line) == 1 for line in lines):
        ids = _development_kit_ids(file.with_name("meta.mat"))
        if unknown := [line[0] for line in lines if line[0] not in ids]:
            raise LabelError(f"{file}: {unknown[0]!r} is not a class number of meta.mat")
        return {IMAGE.format(number): ids[line[0]] for number, line in enumerate(lines, start=1)}
    if bad := [line for line in lines if len(line) != 2]:
        raise LabelError(f"{file}: {' '.join(bad[0])!r} is not a name and a class")
    ordered: list[str] = []
    if any(label.isdigit() for _, label in lines):
        from timm.data import ImageNetInfo  # imports torch, which the other kinds need not wait for

        ordered = ImageNetInfo("imagenet-1k").label_names()
    named = {
        Path(name).stem: ordered[int(label)] if label.isdigit() and int(label) < len(ordered) else label
        for name, label in lines
    }
    return {name: _checked(file, label) for name, label in named.items()}


def _checked(file: Path, label: str) -> str:
    if not WORDNET_ID.fullmatch(label):
        raise LabelError(f"{file}: {label!r} is neither a WordNet id such as n01751748 nor a class number")
    return label


def _development_kit_ids(meta: Path) -> dict[str, str]:
    """The WordNet id of each class number of the development kit: {'490': 'n01751748', ...}."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
    except (OSError, KeyError, ValueError) as error:
        raise LabelError(f"{meta}: can't be read ({error}); it lies beside the ground truth") from None
    return {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}


def plan_moves(folder: Path, labels: dict[str, str]) -> list[tuple[Path, Path]]:
    """Each image still in the folder with its place. Raises LabelError for images without labels or labels
    without images."""
    flat = {path.stem: path for path in folder.iterdir() if path.is_file()}
    if unknown := sorted(set(flat) - set(labels)):
        raise LabelError(f"{folder}: no label for {len(unknown)} files, the first: {flat[unknown[0]].name}")
    sorted_already = {path.stem for path in folder.glob("n*/*")}
    if missing := sorted(set(labels) - set(flat) - sorted_already):
        raise LabelError(f"{folder}: {len(missing)} labelled images are missing, the first: {missing[0]}")
    return [(path, folder / labels[stem] / path.name) for stem, path in sorted(flat.items())]


def main(command_line: list[str] | None = None) -> int:
    """Check, then move. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("labels", type=Path)
    arguments = parser.parse_args(command_line)
    try:
        if not arguments.folder.is_dir():
            raise LabelError(f"{arguments.folder}: no such folder")
        labels = read_labels(arguments.labels)
        moves = plan_moves(arguments.folder, labels)
    except LabelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    for source, target in moves:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    print(f"{len(moves)} images moved; {len(labels)} images in {len(set(labels.values()))} class folders")
    return 0


if __name__ == "__main__":
    sys.exit(main())
