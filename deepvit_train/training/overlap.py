"""Which images of an evaluation a run was trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from deepvit_train.config.data import DataConfig, absolute
from deepvit_train.console import amount
from deepvit_train.data.index import ImageIndex
from deepvit_train.run.checkpoint import read_state
from deepvit_train.run.found import Found
from deepvit_train.training.images import read_paths

TRAIN = "train"


def told_of_overlap(found: Found, data: DataConfig, index: ImageIndex) -> list[str]:
    """Return a warning where a run was trained on images that are to be evaluated, or nothing.

    Args:
        found: the checkpoint of the run.
        data: the data that the images are of.
        index: the images that are evaluated.
    """
    count = count_overlap(found, data, index)
    if not count:
        return []
    which = "all" if count == len(index) else f"{count:,} of"
    return [
        f"warning: {which} {amount(len(index), 'image')} of {index.title} are among those that {found.run} "
        "was trained on, so the accuracy is too high for new images"
    ]


def count_overlap(found: Found, data: DataConfig, index: ImageIndex) -> int:
    """Return how many images of a split a run was trained on, by their real paths.

    The run's folder keeps the list of its training images. Where it does not, the number is 0. The list is
    read only if an image lies where the run read its training images.
    """
    if found.run is None or found.folder is None:
        return 0
    known = read_state(found.folder).get("images", {}).get(TRAIN)
    root, is_own = found.data_path("data_root"), absolute(data.root) == found.data_path("data_root")
    if known is None or (root is None and not is_own):
        return 0
    if is_own and index.part not in ("", TRAIN):
        return 0  # the same hash parted it from train
    home = index.folder.parent if root is None else Path(root)  # the digits lie in the cache folder
    is_whole = found.data_keys().get("val_share") is not None
    folders = dict(_folders(home, is_whole, index.tars is not None))
    below = [set(_below(path, folders)) for path in _real_paths(index)]
    if not any(below):
        return 0
    trained = read_paths(found.run, known["digest"]) or set()
    return sum(not trained.isdisjoint(each) for each in below)


def _folders(home: Path, is_whole: bool, in_tars: bool) -> Iterator[tuple[str, str]]:
    """Yield the real folders of the training images, and how paths from each begin in the run's list."""
    places = [home] if is_whole else [home / TRAIN, *([home] if in_tars else [])]
    for place in places:
        yield os.path.realpath(place), ""
        try:
            with os.scandir(place) as entries:
                links = [entry for entry in entries if entry.is_symlink()]
        except OSError:
            continue
        for link in links:
            yield os.path.realpath(link.path), f"{link.name}/"


def _real_paths(index: ImageIndex) -> Iterator[str]:
    """Yield the path of each image without links. Each folder is looked up once."""
    real: dict[str, str] = {}
    for image in range(len(index)):
        folder, _, name = index.path(image).rpartition("/")
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        path = f"{real[folder]}/{name}"
        yield os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114 - as text


def _below(path: str, folders: dict[str, str]) -> Iterator[bytes]:
    """Yield what the run's list would call an image, for each folder of training images that it lies in."""
    end = len(path)
    while (end := path.rfind("/", 0, end)) > 0:
        if (start := folders.get(path[:end])) is not None:
            yield os.fsencode(f"{start}{path[end + 1 :]}")
