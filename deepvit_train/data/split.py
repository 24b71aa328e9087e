"""Split one folder of classes into train and val by a hash of each path, the same wherever it is read.

Each image's draw depends on its path alone. So an image stays on its side when others are added or removed,
and when the folder is moved or packed into tar files. The exception is a class so small that chance gives it
to one side alone: its nearest image moves, so that each side has one.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepvit_train.console import one_line
from deepvit_train.error import DataError


def draw_groups(paths: Sequence[str], group_by: str | None, name: str) -> np.ndarray:
    """Return a draw for each image, (N,) uint64, evenly spread: the same draw for the images of a group.

    Args:
        paths: of the images, from the folder of the classes on: 'ant/1.jpg'.
        group_by: a regular expression with a group; a path in which it finds none is a group of its own.
        name: what a message calls the data set.

    Raises DataError if the expression finds a group in no path.
    """
    texts = paths
    if group_by is not None:
        groups = find_groups(paths, group_by)
        if paths and not any(groups):
            raise DataError(
                f"data.group_by={group_by}: finds a group in no path of {name}, such as {one_line(paths[0])}"
            )
        texts = [group or path for group, path in zip(groups, paths, strict=True)]
    digests = b"".join(hashlib.blake2b(os.fsencode(text), digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def find_groups(paths: Sequence[str], group_by: str) -> list[str | None]:
    """Return what the first group of a regular expression finds in each path; None where it finds none."""
    found = map(re.compile(group_by).search, paths)
    return [(match and match[1]) or None for match in found]


def drawn_for_val(draws: np.ndarray, targets: np.ndarray, classes: int, share: float) -> np.ndarray:
    """Return which images are val, (N,) bool.

    Those with a draw below the share are. A class of two groups or more that would have none gives its lowest
    draw, and a class that would have none in train keeps its highest, so a class of one image is train.

    Args:
        draws: of each image, as `draw_groups` returns them.
        targets: the class of each image, (N,).
        classes: the number of classes.
        share: of the images that become val, above 0 and below 1.
    """
    lowest, highest = np.full(classes, np.iinfo(np.uint64).max), np.zeros(classes, np.uint64)
    np.minimum.at(lowest, targets, draws)
    np.maximum.at(highest, targets, draws)
    is_val = draws < np.uint64(share * 2.0**64)
    without_val = np.bincount(targets[is_val], minlength=classes) == 0
    is_val |= np.isin(draws, lowest[without_val & (lowest < highest)])
    without_train = np.bincount(targets[~is_val], minlength=classes) == 0
    return is_val & ~np.isin(draws, highest[without_train & (lowest <= highest)])


def path_in_class(path: str, class_name: str) -> str:
    """Return an image's path from its class on, from its path behind that of the tar file's folder."""
    _, *parts = path.split("/")
    below = parts[parts.index(class_name) + 1 :] if class_name in parts[:-1] else parts
    return "/".join([class_name, *below])


def split_hints(root: Path, split: str) -> str:
    """Return a second line for a message that a split is not there, or '' where nothing helps."""
    if split == "train":
        return f"\ndata.val_share=0.1 makes train and val of images in {root}/CLASS/, or of tar files there"
    if (root / "train").is_dir():
        return f"\ndata.root={root / 'train'} data.val_share=0.1 splits the images of train"
    return ""
