"""Which images are read, and how training images are varied."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.error import ConfigError, DataError

# Keys that say which images of its folder a data set consists of, besides those that hold paths.
OF_DATA_SET = ("val_share", "group_by", "classes", "empty_classes")
VAL = "val"  # the split that is evaluated where nobody names one
LONGEST_NAME = 40  # letters of a folder's name that the default name of a run takes over


class DataName(Choice):
    digits = "digits"  # scikit-learn's handwritten digits, written as an ImageFolder into the cache folder
    imagefolder = "imagefolder"  # root/train/CLASS/*.jpg and root/val/CLASS/*.jpg
    tar = "tar"  # the same in tar files: root/train.tar, root/train/*.tar or webdataset's root/train-*.tar


class Balance(Choice):
    none = "none"  # each image once an epoch
    sqrt = "sqrt"  # each class in proportion to the square root of its images
    uniform = "uniform"  # each class equally often


@dataclass(kw_only=True, slots=True)
class DataConfig(Section):
    name: DataName | None = option("kind of data set; null, with a checkpoint: the data it was trained on")
    root: str | None = option(
        "folder of the data set, with train/ and val/ in it; null, for digits alone: the cache folder",
        path=DataError,
    )
    split: str | None = option(
        "name of the split that is evaluated: a folder in root, or its tar files; null: val, and with a "
        "checkpoint the one that its run evaluated"
    )
    val_share: float | None = option(
        "share of the images in root/CLASS/IMAGE that become val, by a hash of each path; the others become "
        "train; null: root holds train/ and val/",
        above=0,
        below=1,
    )
    group_by: str | None = option(
        "regular expression with a group, for val_share: images in whose paths from root on the group finds "
        "the same text all become train or all val; null: each image for itself"
    )
    class_map: str | None = option(
        "text file with lines 'folder: class', for folders that are named otherwise than their class; "
        "null: each folder is named as its class",
        path=DataError,
    )
    classes: str | None = option(
        "classes to use, in the order of a new model's outputs: [ant,bee], or a text file with one a line; "
        "images of others are left out; null: all, in the order of their names"
    )
    empty_classes: bool = option("whether a class may have no image: an empty folder, or a name in classes")
    allow_subset: bool = option(
        "whether a data set may lack classes of the model; an evaluation then leaves out their outputs"
    )
    balance: Balance = option(
        "how often training shows the classes: none: each image once an epoch; sqrt: each class in "
        "proportion to the square root of its images; uniform: each class equally often"
    )
    workers: int | None = option(
        "processes of each rank that load images; null: one for each core, at most 16", low=0, high=1024
    )
    cache: bool = option(
        "whether training keeps in memory what it has read, files or, where nothing varies them, pixels: "
        "at most half of the memory that is free"
    )
    follow_links: bool = option(
        "whether to follow links that lead out of the data set; train and val themselves may always be links"
    )
    max_bad: int = option(
        "training images that may be unreadable; they are replaced by others, and one more ends the run",
        low=0,
    )
    max_bytes: int = option(
        "bytes of the largest file to read; a larger one counts as unreadable", low=1, high=2**40
    )
    max_pixels: int = option(
        "pixels of the largest image to decode; a larger one counts as unreadable", low=1, high=2**32
    )
    value_range: list[float] | None = option(
        "values of grey images of more than 8 bits that become black and white, the same in all images: "
        "[0,4095]; null: as the checkpoint was trained, else 0 and 65535, or 0 and 1 for floats"
    )

    @classmethod
    def prefix(cls) -> str:
        return "data."

    @property
    def evaluated(self) -> str:
        """The name of the split that is evaluated."""
        return VAL if self.split is None else self.split

    def check(self) -> None:
        if not self.evaluated.strip("./"):
            raise ConfigError(f"data.split={self.split!r}: not a folder under root; nearest: data.split=val")
        self._check_val_share()
        span = self.value_range
        if span is not None and (len(span) != 2 or span[0] >= span[1]):
            raise ConfigError(f"data.value_range={span}: needs two numbers, the lower first")
        if self.name in (DataName.imagefolder, DataName.tar) and not self.root:
            raise ConfigError(
                f"data.root is not given: data={self.name} needs data.root=FOLDER with train and val in it"
            )

    def listed_classes(self) -> list[str] | None:
        """Return the names that `classes` lists, or None where it is a file. Quotes keep a comma."""
        text = (self.classes or "").strip()
        if not (text.startswith("[") and text.endswith("]")):
            return None
        return [name.strip() for name in next(csv.reader([text[1:-1]], skipinitialspace=True), [])]

    def of_data_set(self) -> dict[str, Any]:
        """Return the keys of `OF_DATA_SET` and the split that is evaluated, as a checkpoint keeps them."""
        classes = self.classes if self.listed_classes() is not None else absolute(self.classes)
        kept = {key: getattr(self, key) for key in OF_DATA_SET}
        return kept | {"classes": classes, "split": self.evaluated}

    def _check_val_share(self) -> None:
        if self.val_share is not None and self.evaluated not in ("train", VAL):
            raise ConfigError(
                f"data.split={self.split}: data.val_share makes train and val alone; nearest: data.split=val"
            )
        if self.group_by is None:
            return
        if self.val_share is None:
            raise ConfigError(f"data.group_by={self.group_by}: is for data.val_share, which is not given")
        try:
            groups = re.compile(self.group_by).groups
        except re.error as error:
            raise ConfigError(f"data.group_by={self.group_by}: not a regular expression ({error})") from None
        if not groups:
            raise ConfigError(
                f"data.group_by={self.group_by}: has no group; nearest: data.group_by=({self.group_by})"
            )


@dataclass(kw_only=True, slots=True)
class AugmentConfig(Section):
    crop_scale: list[float] | None = option(
        "smallest and largest area of the random crop, share of the image; null: the evaluation crop",
        above=0,
        high=1,
    )
    crop_ratio: list[float] = option(
        "smallest and largest aspect ratio of the random crop", above=0, high=100
    )
    flip: float = option("probability of a horizontal flip", low=0, high=1)
    rotate_degrees: float = option("largest rotation, degrees", low=0, high=180)
    shift: float = option("largest shift, share of the image", low=0, high=1)
    zoom: float = option("largest change of scale, share of the image", low=0, below=1)
    auto_augment: str | None = option(
        "name of a policy of timm, such as rand-m9-mstd0.5-inc1; trivial: torchvision's TrivialAugment; "
        "null: none"
    )
    color_jitter: float = option("strength of brightness, contrast and saturation jitter", low=0, high=10)
    erase: float = option("probability of erasing a box with noise", low=0, high=1)
    random_interpolation: bool = option(
        "whether chance decides if a training image is resized bilinearly or bicubically"
    )
    mixup: float = option("alpha of mixup; 0: off", low=0, high=100)
    cutmix: float = option("alpha of cutmix; 0: off", low=0, high=100)

    repeats: int = option("times that each image is shown in a row, varied anew each time", low=1, high=1000)

    @classmethod
    def prefix(cls) -> str:
        return "augment."

    def check(self) -> None:
        for name in ("crop_scale", "crop_ratio"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or value[0] > value[1]):
                raise ConfigError(f"augment.{name}={value}: needs two numbers, the lower first")


def absolute(path: str | None) -> str | None:
    """Return a path as a checkpoint keeps it: absolute, without links; None for none."""
    return path and str(Path(path).expanduser().resolve())


def data_set_name(name: str | None, root: str | None) -> str:
    """Return what the default name of a run says of its data set: kind and folder, `imagefolder-flowers`.

    The embedded digits have no folder of their own, and are `digits`.
    """
    try:
        folder = os.path.normpath(Path(root).expanduser().absolute()) if root else ""
    except (
        OSError,
        RuntimeError,
    ):  # no working folder, or no such user: what opens the data says so
        folder = root or ""
    short = re.sub(r"[^\w.]+", "-", Path(folder).name).strip("-.")[:LONGEST_NAME]
    return f"{name}-{short}" if short else str(name)
