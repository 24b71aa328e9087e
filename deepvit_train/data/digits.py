"""Write the embedded data set, scikit-learn's handwritten digits, as an ImageFolder of PNGs."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from deepvit_train.atomic import create, make_folder, remove, unfinished
from deepvit_train.console import one_line
from deepvit_train.data.cache import cache_folder
from deepvit_train.determinism import permutation
from deepvit_train.error import DataError

VERSION = "digits-v1"
IMAGES = {"train": 1433, "val": 364}
VAL_SHARE = 5  # of each class, one image of five is for validation


def digits_root() -> Path:
    """Return the folder of the digits, with train/ and val/. It is written to the cache folder if missing.

    Raises DataError if it can't be written, or if some of what was written is gone.
    """
    cache = cache_folder()
    root = cache / VERSION
    if os.path.isdir(root):  # noqa: PTH112 - Path's raises for a name that is too long
        _check_whole(root)
        return root
    try:
        partial = make_folder(unfinished(root))
        try:
            write_digits(partial)
            partial.rename(root)
        except OSError:
            if not root.is_dir():  # else another process was first, and its files are the same
                raise
        finally:
            remove(partial)
    except OSError as error:
        raise DataError(
            f"{cache}: can't write the embedded digits there ({error.strerror}); set XDG_CACHE_HOME to "
            "another folder"
        ) from None
    return root


def _check_whole(root: Path) -> None:
    """Raise DataError unless a folder holds as many images as were written."""
    try:
        found = {
            split: sum(
                name.endswith(".png")
                for folder in (root / split).iterdir()
                for name in os.listdir(folder)  # noqa: PTH208 - 1,797 Paths would take ten times as long
            )
            for split in IMAGES
        }
    except OSError as error:
        raise _damaged(root, f"{error.filename}: {error.strerror}") from None
    if found != IMAGES:
        had = " and ".join(f"{found[split]:,} of {count:,} in {split}" for split, count in IMAGES.items())
        raise _damaged(root, had)


def _damaged(root: Path, reason: str) -> DataError:
    return DataError(
        f"{one_line(str(root))}: the embedded digits are no longer whole ({one_line(reason)}); delete that "
        "folder, and they are written anew"
    )


def write_digits(root: Path) -> dict[str, int]:
    """Write the 1,797 images of 8 x 8 pixels to root/{train,val}/{0..9}/. The split is always the same.

    Returns the number of images of each split.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    written = {"train": 0, "val": 0}
    for label in range(10):
        members = np.flatnonzero(labels == label)
        shuffled = members[permutation(len(members), seed=label)]
        for place, member in enumerate(shuffled):
            split = "val" if place % VAL_SHARE == 0 else "train"
            folder = make_folder(root, split, str(label))
            pixels = np.round(images[member].reshape(8, 8) * (255 / 16)).astype(np.uint8)
            with create(folder / f"{member:04d}.png") as file:
                Image.fromarray(pixels).save(file, "PNG")
            written[split] += 1
    return written
