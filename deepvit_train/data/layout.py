"""Warnings of a data set whose folders are probably not what was meant by them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deepvit_train.data.decode import printable
from deepvit_train.data.index import ImageIndex

LOOKED_AT = 200  # images of each class whose paths are looked at
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
            f"{index.folder}: holds one class alone, {index.classes[0]}; with it every prediction is right: "
            f"loss 0, accuracy 1{hint if inner else ''}"
        ]
    # One folder in each class is a usual layout (CLASS/images/1.jpg).
    if any(len(folders) > 1 for folders in inner.values()):
        return [f"{index.folder}: none of the {len(index.classes)} class folders holds an image itself{hint}"]
    return []


def _inner_folders(index: ImageIndex) -> dict[str, list[str]]:
    """The folders below each class folder; nothing where a class has images of its own."""
    found: dict[str, list[str]] = {}
    ends = np.searchsorted(index.targets, np.arange(len(index.classes)), side="right").tolist()
    start = 0
    for name, end in zip(index.classes, ends, strict=True):
        folders = set()
        for inner in _below_class(index, name, start, end):
            if not inner:
                return {}
            folders.add(inner)
        found[name] = sorted(folders)
        start = end
    return found


def _below_class(index: ImageIndex, name: str, start: int, end: int) -> Iterator[str]:
    """The first folder between a class and each of some of its images; empty where there is none."""
    base = len(f"{index.folder}/")
    for image in np.unique(np.linspace(start, end - 1, min(LOOKED_AT, end - start)).astype(int)).tolist():
        *folders, _ = index.path(image)[base:].split("/")
        below = folders[folders.index(name) + 1 :] if name in folders else []
        yield below[0] if below else ""


def _listed(folders: list[str]) -> str:
    more = f", ... {len(folders) - SHOWN} more" if len(folders) > SHOWN else ""
    return ", ".join(f"{printable(name)}/" for name in folders[:SHOWN]) + more
