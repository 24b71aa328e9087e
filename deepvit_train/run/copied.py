"""What becomes of whole checkpoints that stand where links should be, `last` and `best`.

A copy of a run that followed its links (`cp -rL`, some archives, some object stores) has them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from deepvit_train.error import CheckpointError
from deepvit_train.run.checkpoint import MANIFEST, read_state, verify
from deepvit_train.run.link import LINKS


def copies_in(folder: Path) -> list[Path]:
    """Return the folders in a run's folder of checkpoints that stand where links should be."""
    return [folder / name for name in LINKS if (folder / name).is_dir() and not (folder / name).is_symlink()]


def settle_copies(folder: Path) -> None:
    """Give each of them the name of its step, and leave room for the link. No whole checkpoint is lost.

    A copy of a checkpoint that is there, whole, is deleted. What is neither becomes `last-copied`.
    """
    for copy in copies_in(folder):
        for result in folder.glob(f"{copy.name}.*.json"):
            result.unlink()  # of deepvit-eval; after this it would seem to be about another checkpoint
        step = _step_of(copy)
        own = copy if step is None else folder / f"step_{step:07d}"
        if step is None or (_step_of(own) is not None and _manifest(own) != _manifest(copy)):
            copy.rename(_free(folder / f"{copy.name}-copied"))
        elif _step_of(own) is None:
            if own.exists():
                own.rename(_free(folder / f"{own.name}-damaged"))
            copy.rename(own)
        else:
            shutil.rmtree(copy)


def _step_of(path: Path) -> int | None:
    """Return the step of a whole checkpoint, or None if it is not there or is not whole."""
    try:
        verify(path)
        return int(read_state(path)["step"])
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return None


def _manifest(path: Path) -> str:
    return (path / MANIFEST).read_text()


def _free(path: Path) -> Path:
    """Return a name that nothing has yet: the path itself, or with a number behind it."""
    numbered = (path.with_name(f"{path.name}-{number}") for number in range(2, 10**6))
    return path if not path.exists() else next(each for each in numbered if not each.exists())
