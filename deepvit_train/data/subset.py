"""Copy part of a data set to a folder of its own, choosing the same images every time."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepvit_train.atomic import create, make_folder, new_folder, place_link
from deepvit_train.console import amount
from deepvit_train.data.index import ImageIndex, scan_split
from deepvit_train.determinism import derive_seed, permutation
from deepvit_train.error import DataError


def copy_images(root: Path, folder: Path, counts: dict[str, int | None]) -> None:
    """Copy some images of each split to a folder, as many of each class.

    A split that is there already stays as it is.

    Args:
        root: folder of the data set.
        folder: where to copy to.
        counts: images of each split; None: link the whole split.

    Raises:
        DataError: the number can't be shared evenly by the classes, or a class has too few images.
    """
    due = {split: count for split, count in counts.items() if not (folder / split).exists()}
    # Every split is looked at before the first folder is made, so that a wrong root leaves none behind.
    splits = {split: scan_split(root, split, follow_links=False) for split in due}
    chosen = {
        split: _evenly(splits[split], count, after=0) for split, count in due.items() if count is not None
    }
    for split, index in splits.items():
        make_folder(folder)
        if split not in chosen:
            place_link(folder / split, str(index.folder.resolve()))
            continue
        _copy(index, folder / split, chosen[split])


def hold_out(root: Path, folder: Path, train: Path, after: int, count: int) -> None:
    """Make a data set for a search: `val` holds training images that are not among the first `after`.

    Args:
        root: folder of the data set.
        folder: where to make it. A split that is there already stays as it is.
        train: the folder that `copy_images` made of the first `after` training images. A link leads to it.
        count: images to hold out, as many of each class.

    Raises DataError where there are not enough images.
    """
    if not (folder / "val").exists():
        index = scan_split(root, "train", follow_links=False)
        chosen = _evenly(index, count, after)
        make_folder(folder)
        _copy(index, folder / "val", chosen)
    if not (folder / "train").exists():
        place_link(folder / "train", str(train.resolve()))


def _copy(index: ImageIndex, folder: Path, chosen: list[int]) -> None:
    with new_folder(folder) as copied:
        for place in chosen:
            file = Path(index.path(place))
            target = copied / file.relative_to(index.folder)
            make_folder(target.parent)
            with file.open("rb") as original, create(target) as copy:
                shutil.copyfileobj(original, copy)


def _evenly(index: ImageIndex, count: int, after: int) -> list[int]:
    """Choose the places of `count` images behind the first `after`, as many of each class.

    Every study gets the same choice.
    """
    each, rest = divmod(count, len(index.classes))
    before = after // len(index.classes)
    if rest:
        raise DataError(
            f"{amount(count, 'image')} can't be shared evenly by "
            f"{amount(len(index.classes), 'class', 'classes')}"
        )
    chosen: list[int] = []
    for label in range(len(index.classes)):
        members = (index.targets == label).nonzero()[0]
        if len(members) < before + each:
            raise DataError(
                f"{index.folder}: class {index.classes[label]} has {amount(len(members), 'image')}, "
                f"not {before + each}"
            )
        order = permutation(len(members), derive_seed("study", label))
        chosen += members[order[before : before + each]].tolist()
    return chosen
