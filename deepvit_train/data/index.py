"""The index of a data set: which images there are, the class of each, and where it is read."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from deepvit_train.classes import TORCHVISION, ordered, read_chosen, read_map
from deepvit_train.config.data import DataConfig, DataName
from deepvit_train.console import amount
from deepvit_train.data import cache
from deepvit_train.data.cache import Arrays, Listing, Names
from deepvit_train.data.decode import read_file
from deepvit_train.data.digits import digits_root
from deepvit_train.data.ending import as_names, from_names, summed_up
from deepvit_train.data.folder import WHOLE, MissingSplitError, Walk
from deepvit_train.data.kept import KeptBytes, KeptPixels
from deepvit_train.data.split import draw_groups, drawn_for_val, path_in_class, split_hints
from deepvit_train.data.tar import TarFiles, list_tars
from deepvit_train.error import DataError, nearest


@dataclass(frozen=True)
class ImageIndex:
    """The images of one split, sorted by class and path.

    All paths, relative to `folder`, are one array of bytes, and `ends` says where each ends: loader processes
    share such arrays instead of copying them, as they would copy a list of str by counting references.
    `digest` is of paths and classes as they were listed; it is '' where nobody needs it.
    """

    folder: Path
    classes: list[str]
    paths: np.ndarray
    ends: np.ndarray
    targets: np.ndarray
    tars: TarFiles | None = None
    digest: str = ""
    left_out: dict[str, int] = field(default_factory=dict)  # files that are no images, by ending
    part: str = ""  # 'train' or 'val', where data.val_share split one folder
    kept: KeptBytes | KeptPixels | None = None  # of what was read before, where data.cache asks for it

    def __len__(self) -> int:
        return len(self.ends)

    def told_of_left_out(self) -> str | None:
        """A line on the files that are no images that can be read; None if there are none."""
        if not self.left_out:
            return None
        files = amount(sum(self.left_out.values()), "file")
        return f"{self.folder}: left out {files}, not images that can be read: {summed_up(self.left_out)}"

    @property
    def title(self) -> str:
        """What a message calls the split: its folder, and which part of it where it is a part."""
        return f"{self.folder} ({self.part})" if self.part else str(self.folder)

    def take(self, chosen: np.ndarray) -> ImageIndex:
        """Return the index of some images, with a digest of its own. The classes stay.

        Args:
            chosen: whether each image is among them, (N,) bool.
        """
        lengths = np.diff(self.ends, prepend=0)
        arrays = {
            "paths": self.paths[np.repeat(chosen, lengths)],
            "ends": lengths[chosen].cumsum(),
            "targets": self.targets[chosen],
        }
        tars = self.tars and TarFiles(self.tars.files, self.tars.places[chosen])
        return replace(self, **arrays, tars=tars, digest=_digest(arrays, self.classes))

    def paths_in_class(self) -> list[str]:
        """The paths of all images from the classes' folder on, the same in a folder and in tar files."""
        text, places = self.paths.tobytes(), [0, *self.ends.tolist()]
        paths = [os.fsdecode(text[start:end]) for start, end in pairwise(places)]
        if self.tars is None:
            return paths
        names = (self.classes[target] for target in self.targets.tolist())
        return [path_in_class(path, name) for path, name in zip(paths, names, strict=True)]

    def path(self, image: int) -> str:
        """The file of an image; in a tar file its path behind that of the tar file."""
        start = self.ends[image - 1] if image else 0
        return f"{self.folder}/{os.fsdecode(self.paths[start : self.ends[image]].tobytes())}"

    def file(self, image: int) -> str:
        """The file on disk that holds an image: itself, or a tar file."""
        return self.path(image) if self.tars is None else self.tars.files[self.tars.places[image, 0]]

    def read(self, image: int, max_bytes: int) -> bytes:
        """The content of an image, from memory if it is kept there. Raises BadImageError."""
        if not isinstance(self.kept, KeptBytes):
            return self.read_from_disk(image, max_bytes)
        data = self.kept.get(image)
        if data is None:
            data = self.read_from_disk(image, max_bytes)
            self.kept.put(image, data)
        return data

    def read_from_disk(self, image: int, max_bytes: int) -> bytes:
        """The content of an image, as it is on the disk now. Raises BadImageError."""
        if self.tars is None:
            return read_file(self.path(image), max_bytes)
        return self.tars.read(image, self.path(image), max_bytes)


def data_root(data: DataConfig) -> Path:
    """The folder that holds the splits. Raises DataError where it is missing."""
    if data.root is None and data.name == DataName.digits:
        return digits_root()
    try:
        folder = Path(data.root or "").expanduser()
        present = folder.is_dir()
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.root={data.root}: can't be read ({reason})") from None
    if not present:
        raise DataError(f"data.root={data.root}: no such folder")
    return folder


def open_split(data: DataConfig, split: str, is_for_training: bool = False) -> ImageIndex:
    """The index of a split of a data set, its folders named as data.class_map says.

    Raises DataError. For a training it says how a folder without the split is split: an evaluation must not
    be told so, because it would evaluate images that the model was trained on.
    """
    root = data_root(data)
    try:
        index = _scan(root, split if data.val_share is None else WHOLE, data)
    except MissingSplitError as error:
        raise DataError(f"{error}{split_hints(root, split) if is_for_training else ''}") from None
    chosen = renamed(index, data)
    _refuse_empty(chosen, data.empty_classes)
    return chosen if data.val_share is None else renamed(part_of(index, data, split), data)


def _scan(root: Path, split: str, data: DataConfig) -> ImageIndex:
    if data.name == DataName.tar:
        return scan_tars(root, split)
    return scan_split(root, split, data.follow_links, empty_classes=True)


def part_of(whole: ImageIndex, data: DataConfig, split: str) -> ImageIndex:
    """The images of one folder that data.val_share and data.group_by make train, or val. Raises DataError."""
    assert data.val_share is not None
    draws = draw_groups(whole.paths_in_class(), data.group_by, str(whole.folder))
    is_val = drawn_for_val(draws, whole.targets, len(whole.classes), data.val_share)
    if not is_val.any():
        groups = "group" if data.group_by else "image"
        raise DataError(f"{whole.folder}: no class has a second {groups}, so data.val_share leaves val empty")
    return replace(whole.take(is_val if split == "val" else ~is_val), part=split)


def renamed(index: ImageIndex, data: DataConfig) -> ImageIndex:
    """The index with the classes that data.class_map and data.classes say. Raises DataError."""
    index = _mapped(index, data)
    if data.classes is None:
        return index
    names = read_chosen(data.classes, data.listed_classes())
    if not data.empty_classes and (unknown := [name for name in names if name not in index.classes]):
        if not data.allow_subset:
            guess = nearest(unknown[0], index.classes)
            raise DataError(f"data.classes: {index.title} has no class {unknown[0]}{guess}")
        names = [name for name in names if name in index.classes]
    places = {name: place for place, name in enumerate(names)}
    targets = np.array([places.get(name, -1) for name in index.classes], np.int32)[index.targets]
    return replace(index, classes=names, targets=targets).take(targets >= 0)


def _mapped(index: ImageIndex, data: DataConfig) -> ImageIndex:
    """The index with the classes that data.class_map gives to folders; several folders may be one class.

    Raises DataError for a folder that is not there, unless the data set may lack classes.
    """
    if data.class_map is None:
        return index
    names = read_map(data.class_map)
    if strangers := sorted(set(names) - set(index.classes)):
        guess = nearest(strangers[0], index.classes)
        if not data.allow_subset:
            raise DataError(
                f"data.class_map={data.class_map}: {index.folder} has no folder {strangers[0]}{guess}"
            )
    given = [names.get(folder, folder) for folder in index.classes]
    classes = ordered(set(given), TORCHVISION)
    numbers = {name: number for number, name in enumerate(classes)}
    targets = np.array([numbers[name] for name in given], np.int32)[index.targets]
    return replace(index, classes=classes, targets=targets)


def scan_split(root: Path, split: str, follow_links: bool, empty_classes: bool = False) -> ImageIndex:
    """Index root/split/CLASS/**/*.{jpg,png,...}. Raises DataError naming what is missing or empty."""
    walk = Walk(root.absolute(), split, follow_links)
    kept, names = _kept(("folder", root.absolute(), split, follow_links), partial(_list, walk))
    arrays = kept["paths"], kept["ends"], kept["targets"]
    left_out = from_names(names["left_out"])
    digest = names["digest"][0]
    index = ImageIndex(root / split, names["classes"], *arrays, digest=digest, left_out=left_out)
    _refuse_empty(index, empty_classes)
    return index


def _refuse_empty(index: ImageIndex, empty_classes: bool) -> None:
    """Raise DataError where a class has no image and none may be empty, or where all are."""
    counts = np.bincount(index.targets, minlength=len(index.classes))
    empty = [name for name, images in zip(index.classes, counts, strict=True) if not images]
    if empty and (not empty_classes or not len(index)):
        raise DataError(
            f"{index.folder.absolute()}: no image in class {', '.join(empty[:5])} "
            f"(docs/data.md lists the endings){'; left out: ' * bool(index.left_out)}"
            f"{summed_up(index.left_out)}"
            "\ndata.empty_classes=true trains without them"
        )


def scan_tars(root: Path, split: str) -> ImageIndex:
    """Index the tar files of a split. Raises DataError."""
    kept, names = _kept(("tar", root.absolute(), split), partial(list_tars, root.absolute(), split))
    tars, folder = TarFiles(names["tars"], kept["places"]), Path(names["tars"][0]).parent
    arrays = kept["paths"], kept["ends"], kept["targets"]
    left_out = from_names(names["left_out"])
    return ImageIndex(folder, names["classes"], *arrays, tars, names["digest"][0], left_out)


def _kept(key: tuple[object, ...], make: Callable[[], Listing]) -> tuple[Arrays, Names]:
    """What the cache keeps under a key, or what is made now."""
    file = cache.cache_file(*key)
    kept = cache.read(file)
    if kept is None:
        started = time.time()
        arrays, names, stamps = make()
        names["digest"] = [_digest(arrays, names["classes"])]
        cache.write(file, arrays, names, stamps, started)
        kept = arrays, names
    return kept


def _digest(arrays: Arrays, classes: list[str]) -> str:
    """A digest of which images there are, and of the class of each."""
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for name in ("targets", "ends", "paths"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _list(walk: Walk) -> Listing:
    classes = walk.classes()
    arrays = _arrays(walk.images(name) for name in classes)
    return arrays, {"classes": classes, "left_out": as_names(walk.left_out)}, walk.stamps


def index_images(folder: Path, images: dict[str, list[str]]) -> ImageIndex:
    """The index of images given by class, their paths relative to the folder."""
    arrays = _arrays(images.values())
    return ImageIndex(folder, list(images), arrays["paths"], arrays["ends"], arrays["targets"])


def _arrays(images_by_class: Iterable[list[str]]) -> Arrays:
    """Paths, ends and targets of an index; the lists are taken one at a time and not kept."""
    blocks: list[bytes] = []
    lengths: list[np.ndarray] = []
    for images in images_by_class:
        paths = [os.fsencode(path) for path in images]
        blocks.append(b"".join(paths))
        lengths.append(np.array([len(path) for path in paths], dtype=np.int64))
    return {
        "paths": np.frombuffer(b"".join(blocks), dtype=np.uint8),
        "ends": np.concatenate([np.empty(0, np.int64), *lengths]).cumsum(),
        "targets": np.repeat(np.arange(len(lengths), dtype=np.int32), [len(found) for found in lengths]),
    }
