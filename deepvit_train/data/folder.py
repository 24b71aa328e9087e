"""The images under a folder of class folders, in ImageFolder's layout; where links may lead."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from deepvit_train.console import amount, one_line
from deepvit_train.data.cache import Stamp, stamp_of
from deepvit_train.data.ending import EVALUATED, OUTSIDE, ending_of, is_image, split_hint
from deepvit_train.error import DataError

WHOLE = "."  # in the place of a split's name: the class folders lie in the root itself


class MissingSplitError(DataError):
    """A split that has neither a folder nor tar files."""


@dataclass
class Walk:
    """Lists the files of one split.

    `stamps` are of all listed folders, to tell later changes. `left_out` counts the files that are no images,
    by ending, and the images that lie in no class folder.
    """

    root: Path
    split: str
    follow_links: bool
    stamps: list[Stamp] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._stamped: set[str] = set()
        # The split's folder may itself be a link: what it leads to belongs to the data set.
        self._inside = (os.path.realpath(self.root), os.path.realpath(self.root / self.split))

    def classes(self) -> list[str]:
        """The names of the class folders, sorted. Raises DataError."""
        folder = self.root / self.split
        if not os.path.isdir(folder):  # noqa: PTH112 - Path's raises where it may not look
            raise self._missing(folder)
        classes = []
        for entry in self._entries(str(folder)):
            if _is_folder(entry):
                classes.append(entry.name)
            else:
                self.left_out[ending_of(entry.name) + OUTSIDE * is_image(entry.name)] += 1
        if self.split == WHOLE:
            refuse_splits(self.root, classes)
        if not classes:
            loose = sum(count for ending, count in self.left_out.items() if ending.endswith(OUTSIDE))
            hint = "sort them into class folders; scripts/sort_imagenet_val.py does so for ImageNet"
            raise DataError(
                f"{folder}: holds no class folders (expected {folder}/CLASS/IMAGE.jpg)"
                + (f"\n{amount(loose, 'image')} lie in it directly: {hint}" if loose else "")
            )
        for name in classes:
            if one_line(name) != name:
                raise DataError(
                    f"{folder}: the class folder {one_line(name)!r} has a name that can't be shown"
                )
        return classes

    def images(self, class_name: str) -> list[str]:
        """The images of a class, relative to the split's folder: its own, then those of each subfolder."""
        folder = f"{self.root / self.split}"
        return self._relative(folder, f"{folder}/{class_name}", [os.path.realpath(folder)])

    def every_image(self) -> list[str]:
        """The images at any depth, relative to the split's folder: its own, then those of each subfolder."""
        folder = f"{self.root / self.split}"
        return self._relative(folder, folder, [])

    def _relative(self, split: str, folder: str, above: list[str]) -> list[str]:
        """The images of a folder, relative to the split's."""
        try:
            found = self._images(folder, above)
        except RecursionError:
            raise DataError(f"{folder}: folders are nested too deep") from None
        return [path[len(split) + 1 :] for path in found]

    def _images(self, folder: str, above: list[str]) -> list[str]:
        """`above` holds the real paths of the folders that this one lies in."""
        real = self._checked(folder)
        if real in above:
            raise DataError(f"{one_line(folder)}: a link that leads back to a folder it lies in")
        files, folders = [], []
        for entry in self._entries(folder):
            if _is_folder(entry):
                folders.append(entry.path)
            elif is_image(entry.name):
                if entry.is_symlink():
                    self._follow(entry.path)
                files.append(entry.path)
            else:
                self.left_out[ending_of(entry.name)] += 1
        for inner in folders:
            files += self._images(inner, [*above, real])
        return files

    def _missing(self, folder: Path) -> DataError:
        """The error for a split's folder that is not there: what is there instead."""
        present = [entry.name for entry in self._entries(str(self.root)) if _is_folder(entry)]
        if self.split in present:
            return DataError(f"{folder}: can't be listed (Permission denied)")
        return MissingSplitError(
            f"{folder}: no such folder; {self.root} holds {one_line(', '.join(present[:5])) or 'no folders'}"
            f"{split_hint(self.split, present)}"
        )

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What a folder holds, by name; hidden names are left out, as tools leave them everywhere."""
        try:
            self._stamp(folder)
            with os.scandir(folder) as entries:
                return sorted(
                    (entry for entry in entries if not entry.name.startswith(".")),
                    key=lambda entry: entry.name,
                )
        except OSError as error:
            raise DataError(f"{one_line(folder)}: can't be listed ({error.strerror})") from None

    def _follow(self, link: str) -> None:
        """Check a link to a file, and stamp the folder it leads to: a link may take the file's place."""
        folder = os.path.dirname(self._checked(link))  # noqa: PTH120 - realpath's text, without a Path
        if os.path.isdir(folder):  # noqa: PTH112 - as above
            self._stamp(folder)

    def _stamp(self, folder: str) -> None:
        if folder not in self._stamped:
            self._stamped.add(folder)
            self.stamps.append(stamp_of(folder))

    def _checked(self, path: str) -> str:
        """The real path. Raises DataError for a link that leads out of the data set."""
        real = os.path.realpath(path)
        inside = any(real == folder or real.startswith(folder + os.sep) for folder in self._inside)
        if not inside and not self.follow_links:
            raise DataError(
                f"{one_line(path)}: a link that leads out of {self.root}, to {one_line(real)}; "
                "data.follow_links=true allows it"
            )
        return real


def refuse_splits(root: Path, names: list[str]) -> None:
    """Raise DataError where a data set that is to be split is split already, by the names of its parts."""
    found = [name for name in names if name.casefold() in ("train", *EVALUATED)]
    if "train" in found and (len(found) > 1 or names == ["train"]):
        raise DataError(
            f"{root}: holds {' and '.join(found)} already, so data.val_share has nothing to split\n"
            "data.val_share=null takes them as they are"
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself; what reads it says so
