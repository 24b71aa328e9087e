"""What follows from a data set of one's own: its kind where data= is not given, and the model for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from deepvit_train.config.override import typed_text

# The experiment that these kinds of data bring along: a model for photographs instead of handwritten digits.
BROUGHT = "experiment=photographs"
KINDS = ("imagefolder", "tar")
# The key that names the folder of images. Other commands take their data from a checkpoint.
ROOT_KEYS = {"train": "data.root", "data-check": "root"}
HELP = (
    f"data.root=FOLDER without data= is short for {BROUGHT} data.root=FOLDER, and for data=tar where FOLDER "
    f"holds tar files; data=imagefolder and data=tar bring {BROUGHT} too where no model= is given"
)


def implied_choices(command: str, overrides: Sequence[str]) -> list[str]:
    """Return the choices that a command line implies: ['data=imagefolder', 'experiment=photographs'].

    What is typed is never changed: each choice is one that the command line leaves open. A command line that
    types both data= and model= says all there is to say, so it gets nothing else.
    """
    root_key = ROOT_KEYS.get(command)
    if root_key is None:
        return []
    typed = {each.lstrip("+").partition("=")[0]: typed_text(each) for each in overrides}
    implied: list[str] = []
    kind, root, opens = typed.get("data"), typed.get(root_key) or "null", "model" not in typed
    if root != "null" and not {"data", "data.name"} & typed.keys():
        if holds_tars(Path(root), is_whole=typed.get("data.val_share", "null") != "null"):
            kind = "tar"
        elif command == "train" and "experiment" not in typed:
            kind = "imagefolder"
        implied += [f"data={kind}"] if kind else []
        opens = True
    if command == "train" and kind in KINDS and opens and "experiment" not in typed:
        implied.append(BROUGHT)
    return implied


def holds_tars(root: Path, is_whole: bool = False) -> bool:
    """Return whether the training images of a folder are in tar files, and not in class folders.

    Args:
        is_whole: whether data.val_share makes train and val of all that the folder holds.
    """
    try:
        root = root.expanduser()
        if is_whole:
            with os.scandir(root) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
            return any(entry.name.endswith(".tar") for entry in found) and not any(map(_is_folder, found))
        if (root / "train").is_dir():
            with os.scandir(root / "train") as entries:
                if any(entry.is_dir() for entry in entries):
                    return False
        return any(
            next(iter(files), None) is not None
            for files in (root.glob("train.tar"), root.glob("train/*.tar"), root.glob("*train-*.tar"))
        )
    except (OSError, RuntimeError, ValueError):
        return False  # what is wrong with the folder is told where it is read


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir()
