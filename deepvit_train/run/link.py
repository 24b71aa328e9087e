"""Where the links in a run's folder may lead: `last` and `best` to a checkpoint beside them, others nowhere.

A copy of a run that followed its links (`cp -rL`) has folders there, which are as good.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from deepvit_train.error import CheckpointError

FOLDER = "checkpoints"  # in a run's folder
SET_ASIDE = "-before"  # ends the name of a checkpoint while another of its step takes its place
NAME = re.compile(rf"step_(\d+)(?:{SET_ASIDE})?", re.ASCII)
LINKS = ("last", "best")


def leads_to(folder: Path, name: str) -> Path | None:
    """Return the checkpoint that `last` or `best` of a folder means, or None if there is none.

    A kill can leave the link dangling; then it is the checkpoint that was set aside. Raises CheckpointError
    for a link to anything but a checkpoint of the folder.
    """
    link = folder / name
    if not link.is_symlink():
        return link if link.is_dir() else None
    target = target_of(link)
    found = folder / target
    if not NAME.fullmatch(target) or found.is_symlink():
        raise CheckpointError(f"{link}: is a link to {target!a}, not to a checkpoint beside it")
    aside = folder / f"{target}{SET_ASIDE}"
    return next((each for each in (found, aside) if each.is_dir() and not each.is_symlink()), None)


def target_of(link: Path) -> str:
    """Return the name that a link leads to, or an empty text if it is none."""
    return os.readlink(link) if link.is_symlink() else ""  # noqa: PTH115 - Path.readlink would normalise it


def check_links(checkpoint: Path) -> None:
    """Raise CheckpointError for a checkpoint that a link in its run's folder leads to."""
    folder = checkpoint.parent
    check_folder(folder)
    if checkpoint.name in LINKS and (folder.name == FOLDER or any(folder.glob("step_*"))):
        leads_to(checkpoint.parent, checkpoint.name)
    elif NAME.fullmatch(checkpoint.name) and checkpoint.is_symlink():
        raise CheckpointError(f"{checkpoint}: is a link, not the folder of a checkpoint")


def check_folder(folder: Path) -> None:
    """Raise CheckpointError for a run's folder of checkpoints that is a link."""
    if folder.name == FOLDER and folder.is_symlink():
        raise CheckpointError(f"{folder}: is a link, not a folder; name the folder that it leads to")
