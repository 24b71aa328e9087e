"""Part of a data set in a folder of its own: the same choice every time."""

from __future__ import annotations

import shutil
from pathlib import Path

from deepvit_train.data.index import ImageIndex, scan_split
from deepvit_train.determinism import derive_seed, permutation
from deepvit_train.error import DataError


def copy_images(root: Path, folder: Path, counts: dict[str, int | None]) -> None:
    """Copy so many images of each split into a folder, evenly over classes; of a split with None link all.

    A split that is there already stays. Raises DataError where the images can't be shared evenly.
    """
    for split, count in counts.items():
        if (folder / split).exists():
            continue
        index = scan_split(root, split, follow_links=False)
        folder.mkdir(parents=True, exist_ok=True)
        if count is None:
            (folder / split).symlink_to(index.folder.resolve(), target_is_directory=True)
            continue
        partial = folder / f".{split}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for place in _evenly(index, count):
            file = Path(index.path(place))
            target = partial / file.relative_to(index.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        partial.rename(folder / split)


def _evenly(index: ImageIndex, count: int) -> list[int]:
    """The same choice for every study: as many images of each class as of any other."""
    each, rest = divmod(count, len(index.classes))
    if rest:
        raise DataError(f"{count} images can't be shared evenly by {len(index.classes)} classes")
    chosen: list[int] = []
    for label in range(len(index.classes)):
        members = (index.targets == label).nonzero()[0]
        if len(members) < each:
            raise DataError(
                f"{index.folder}: class {index.classes[label]} has {len(members)} images, not {each}"
            )
        chosen += members[permutation(len(members), derive_seed("study", label))[:each]].tolist()
    return chosen
