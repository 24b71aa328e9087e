"""The sets that ImageNet's models are tested on: how each lies on a disk, and which class a folder is.

V2      FOLDER/0 ... FOLDER/999: a class folder is the number of the class
A, R, Sketch, validation    FOLDER/n01440764 ...: a class folder is the class's WordNet id
C       FOLDER/gaussian_noise/1/n01440764 ..., or FOLDER/noise/gaussian_noise/1/n01440764 ...
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo

from deepvit_train.console import amount
from deepvit_train.data.index import ImageIndex, index_images, scan_split
from deepvit_train.error import DataError

CLASSES = 1000
C_SEVERITIES = range(1, 6)
# ImageNet-C's corruptions by the tar file that each comes in. The mean corruption error is without extra's.
C_CORRUPTIONS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}


@cache
def imagenet_classes() -> list[str]:
    """Return the WordNet ids of ImageNet-1k's classes, in the order of their numbers."""
    return ImageNetInfo("imagenet-1k").label_names()


def open_folder(key: str, given: str, follow_links: bool) -> ImageIndex:
    """Index a set by its folder of class folders, its classes by their WordNet ids.

    Raises DataError if the folder is missing, or its class folders are not ImageNet's.
    """
    folder = Path(os.path.abspath(Path(given).expanduser()))  # noqa: PTH100 - a link's own name is kept
    if not folder.is_dir():
        raise DataError(f"{key}={given}: no such folder")
    index = scan_split(folder.parent, folder.name, follow_links)
    known = set(imagenet_classes())
    if set(index.classes) <= {str(number) for number in range(CLASSES)}:
        names = [imagenet_classes()[int(name)] for name in index.classes]
        # The numbers of classes were given in the order of their folders' names: 0, 1, 10, 100.
        return _numbered(index, names)
    if strangers := [name for name in index.classes if name not in known]:
        raise DataError(
            f"{key}={given}: {strangers[0]} is no class of ImageNet-1k; its class folders are WordNet ids, "
            "n01440764, or numbers from 0 to 999"
        )
    return index


def _numbered(index: ImageIndex, names: list[str]) -> ImageIndex:
    """Return an index whose classes have other names, which are sorted anew."""
    classes = sorted(names)
    numbers = np.array([classes.index(name) for name in names], np.int32)
    return replace(index, classes=classes, targets=numbers[index.targets])


def known_part(index: ImageIndex, names: list[str]) -> ImageIndex:
    """Return the images of those classes that a model knows. Raises DataError if there are none."""
    known = set(names)
    kept = [name for name in index.classes if name in known]
    if len(kept) == len(index.classes):
        return index
    if not kept:
        raise DataError(
            f"{index.folder}: the model knows none of its {amount(len(index.classes), 'class', 'classes')}"
        )
    images: dict[str, list[str]] = {name: [] for name in kept}
    start = len(str(index.folder)) + 1
    for image, target in enumerate(index.targets.tolist()):
        if (name := index.classes[target]) in known:
            images[name].append(index.path(image)[start:])
    return replace(index_images(index.folder, images), digest=index.digest)


def find_corrupted(given: str) -> dict[str, dict[int, Path]]:
    """Return the folders of ImageNet-C that are there, by corruption and severity.

    Raises DataError if there is none.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise DataError(f"suite.c={given}: no such folder")
    found: dict[str, dict[int, Path]] = {}
    for group, corruptions in C_CORRUPTIONS.items():
        for corruption in corruptions:
            for place in (folder / corruption, folder / group / corruption):
                severities = {
                    each: place / str(each) for each in C_SEVERITIES if (place / str(each)).is_dir()
                }
                if severities and corruption not in found:
                    found[corruption] = severities
    if not found:
        raise DataError(
            f"suite.c={given}: holds no CORRUPTION/SEVERITY/CLASS, such as gaussian_noise/1/n01440764"
        )
    return found
