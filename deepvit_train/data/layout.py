"""Warnings of a data set whose folders are probably not what was meant by them."""

from __future__ import annotations

import numpy as np

from deepvit_train.console import first_of, one_line
from deepvit_train.data.index import ImageIndex

LOOKED_AT = 20  # images of each class whose paths are looked at
SHOWN = 5


def layout_warnings(index: ImageIndex) -> list[str]:
    """Return a warning for a split of one class alone, and for class folders that hold folders of classes."""
    inner = {} if not index.classes else _inner_folders(index)
    seen = "; ".join(f"{name}/ holds {_listed(folders)}" for name, folders in list(inner.items())[:SHOWN])
    hint = (
        f"; the folders seen: {seen}. If those are the classes, they lie one folder level too deep: they "
        f"belong into {index.folder}"
    )
    if len(index.classes) == 1:
        return [
            f"{index.title}: holds one class alone, {index.classes[0]}; with it every prediction is right: "
            f"loss 0, accuracy 1{hint if inner else ''}"
        ]
    # One folder in each class is a usual layout (CLASS/images/1.jpg).
    if any(len(folders) > 1 for folders in inner.values()):
        return [f"{index.folder}: none of the {len(index.classes)} class folders holds an image itself{hint}"]
    return []


def _inner_folders(index: ImageIndex) -> dict[str, list[str]]:
    """The folders below each class folder; nothing where a class has images of its own."""
    found: dict[str, list[str]] = {}
    # Classes may have got other numbers than those of their order.
    order = np.argsort(index.targets, kind="stable")
    ends = np.bincount(index.targets, minlength=len(index.classes)).cumsum()[:-1]
    for name, images in zip(index.classes, np.split(order, ends), strict=True):
        folders = set()
        for image in images[
            np.linspace(0, len(images) - 1, min(LOOKED_AT, len(images))).astype(int)
        ].tolist():
            if not (inner := _below_class(index, name, image)):
                return {}
            folders.add(inner)
        found[name] = sorted(folders)
    return found


def _below_class(index: ImageIndex, name: str, image: int) -> str:
    """The first folder between a class and an image; empty where there is none."""
    *folders, _ = index.path(image)[len(f"{index.folder}/") :].split("/")
    if index.tars is None:
        below = folders[1:]
    else:
        below = folders[folders.index(name) + 1 :] if name in folders else []
    return next(iter(below), "")


def _listed(folders: list[str]) -> str:
    return first_of([f"{one_line(name)}/" for name in folders], SHOWN)
