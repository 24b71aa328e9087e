"""Sort the flat ILSVRC2012 validation images into class folders, as ImageFolder wants them.

    python scripts/sort_imagenet_val.py FOLDER LABELS

FOLDER holds ILSVRC2012_val_00000001.JPEG and so on. They move into class folders, such as FOLDER/n01751748/.
LABELS is one of the files that name the classes:

    ILSVRC2012_validation_ground_truth.txt   of the development kit; meta.mat beside it gives the classes
    LOC_val_solution.csv                     of Kaggle's copy
    val.txt                                  a line for each image: its name, then a WordNet id, or a class
                                             number 0..999 in the order of the ids

Everything is checked before the first file moves. After an interruption run it again, and it continues.
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
    """A label file or a folder can't be used."""


def read_labels(file: Path) -> dict[str, str]:
    """Return the class of each image: {'ILSVRC2012_val_00000001': 'n01751748', ...}. Raises LabelError."""
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
        from timm.data import ImageNetInfo  # it imports torch, which the other kinds of file do not need

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
    """Return the WordNet id of each class number of the development kit: {'490': 'n01751748', ...}.

    Raises LabelError for a file that can't be read.
    """
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(meta), squeeze_me=True)["synsets"]
    except (OSError, KeyError, ValueError) as error:
        raise LabelError(f"{meta}: can't be read ({error}); put it beside the ground truth") from None
    return {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in synsets}


def plan_moves(folder: Path, labels: dict[str, str]) -> list[tuple[Path, Path]]:
    """Return each image that is still in the folder, with the place to move it to.

    Raises LabelError for images without labels, and for labels without images.
    """
    flat = {path.stem: path for path in folder.iterdir() if path.is_file()}
    if unknown := sorted(set(flat) - set(labels)):
        raise LabelError(f"{folder}: no label for {len(unknown)} files, the first: {flat[unknown[0]].name}")
    sorted_already = {path.stem for path in folder.glob("n*/*")}
    if missing := sorted(set(labels) - set(flat) - sorted_already):
        raise LabelError(f"{folder}: {len(missing)} labelled images are missing, the first: {missing[0]}")
    return [(path, folder / labels[stem] / path.name) for stem, path in sorted(flat.items())]


def main(command_line: list[str] | None = None) -> int:
    """Check everything, then move the images. Returns the exit code."""
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
