"""What a path that the user gave leads to: a weights file, and the checkpoint and run that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deepvit_train.error import CheckpointError, nearest
from deepvit_train.reading import read_yaml, what_lies_at
from deepvit_train.run import hub
from deepvit_train.run.checkpoint import (
    CALIBRATED,
    MANIFEST,
    STATE,
    WEIGHT_FILES,
    UnreadableError,
    check_statistics,
    newest_valid,
    read_calibrated,
    read_state,
    signed,
    verify,
)
from deepvit_train.run.identity import check_place
from deepvit_train.run.link import FOLDER, SET_ASIDE, check_folder, check_links, leads_to


@dataclass(frozen=True)
class Found:
    """What a path that the user gave leads to: a weights file, and the checkpoint and run it belongs to.

    Args:
        file: the weights file.
        folder: the folder of its checkpoint, or None for a weights file on its own.
        run: the folder of its run, or None if the checkpoint lies outside of one.
        kind: 'live' or 'ema', by the file's name. A file of torch.save may hold both; its reader chooses.
        label: what results about a file of the hub are named after, 'ORG--NAME'; None for a file of the user.
    """

    file: Path
    folder: Path | None
    run: Path | None
    kind: str
    label: str | None = None

    def calibrated(self, model: nn.Module | None = None) -> dict[str, Tensor] | None:
        """Return the calibrated statistics of these weights, or None if there are none.

        Raises CheckpointError where they are not those of the model's BatchNorms.
        """
        found = None if self.folder is None else read_calibrated(self.folder).get(self.kind)
        if found is not None and model is not None:
            check_statistics(model, found, self.file.with_name(CALIBRATED))
        return found

    def data_path(self, key: str) -> str | None:
        """Return the path that the run's data had for a key, or None if that is not known.

        Args:
            key: 'data_root' for the folder of its images, 'class_map' for the file of their classes.
        """
        path = None if self.folder is None else read_state(self.folder).get(key)
        return None if path is None else str(path)

    def data_keys(self) -> dict[str, Any]:
        """Return what else the run said of which images its data set consists of: {'val_share': 0.1}."""
        return {} if self.folder is None else read_state(self.folder).get("data_keys", {})

    def split(self) -> str | None:
        """Return the name of the split that the run evaluated, or None if that is not known.

        A checkpoint of an earlier version does not keep it; the configuration of its run does.
        """
        if (kept := self.data_keys().get("split")) is not None:
            return kept
        try:
            said = None if self.run is None else read_yaml(self.run / "config.yaml")["data"]["split"]
        except (OSError, CheckpointError, KeyError, TypeError):
            return None
        return said if isinstance(said, str) else None

    @property
    def home(self) -> Path:
        """The folder to make for results about a weights file on its own, beside it."""
        return self.file.with_suffix("") if self.label is None else Path(self.label)

    def beside(self, ending: str) -> Path:
        """Return the path for a result: beside the checkpoint's folder, or beside a weights file.

        Of a file of the hub it is in the working folder: the hub's cache is no place for results.
        """
        if self.label is not None:
            return Path(f"{self.label}.{ending}")
        subject = self.file if self.folder is None else self.folder.resolve()
        return subject.with_name(f"{subject.name}.{ending}")


def find(
    path: str, weights: str = "auto", prefer: str = "best", key: str = "checkpoint", download: bool = False
) -> Found:
    """Find the weights file that a path means. The checkpoint that was chosen for it is verified.

    Args:
        path: a weights file; a folder of deepvit-convert; a checkpoint; a run, which stands for its best
            checkpoint, or for its newest whole one if it has no best one; or hf:ORG/NAME[@REVISION].
        weights: 'live', 'ema', or 'auto' for the averaged weights where a checkpoint has both.
        prefer: 'best', or 'last' if a run is to stand for its newest whole checkpoint.
        key: the key that the path was given by, for messages.
        download: whether a file of the hub that is not in its cache is fetched.

    Raises CheckpointError.
    """
    try:
        if (repository := hub.parse(path)) is not None:
            return Found(hub.weights_file(repository, download), None, None, "live", repository.label)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{key}={path}: {error}") from None
    try:
        given = _followed(Path(path).expanduser())
        return _found_at(given, weights, prefer, key)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        reason = getattr(error, "strerror", None) or error
        raise UnreadableError(f"{key}={path}: can't be read ({reason})") from None


def _found_at(given: Path, weights: str, prefer: str, key: str) -> Found:
    check_links(given.parent if given.is_file() else given)
    if given.is_file():
        if (given.parent / MANIFEST).exists():
            verify(given.parent)
        return _found(given)
    if given.exists() and not given.is_dir():
        raise CheckpointError(f"{key}={given}: is {what_lies_at(given)}, not a file or a folder")
    if not given.is_dir():
        siblings = [entry.name for entry in given.parent.iterdir()] if given.parent.is_dir() else []
        raise CheckpointError(f"{key}={given}: no such file or folder{nearest(given.name, siblings)}")
    if (given / MANIFEST).exists() or (given / STATE).exists():
        verify(given)
        return _found(_weights_in(given, weights))
    if (converted := given / f"{WEIGHT_FILES['live']}.safetensors").is_file():
        return _found(converted)
    return _found(_weights_in(_chosen_of_run(given, prefer, key), weights))


def _followed(path: Path) -> Path:
    """Follow a link that a kill left dangling, to the checkpoint that was set aside."""
    aside = Path(f"{path.resolve()}{SET_ASIDE}") if path.is_symlink() else path
    return aside if not path.exists() and aside.exists() else path


def _chosen_of_run(given: Path, prefer: str, key: str) -> Path:
    """Choose a checkpoint of a run, verified. The run's folder or its folder of checkpoints was given."""
    folder = given if given.name == FOLDER else given / FOLDER
    check_folder(folder)
    if prefer == "best" and (best := leads_to(folder, "best")) is not None:
        verify(best)
        check_place(folder / "best", read_state(best))
        return best.resolve()
    problems: list[str] = []
    newest = newest_valid(folder, problems.append)
    if newest is None:
        raise CheckpointError(
            problems[0] if problems else f"{key}={given}: holds no checkpoint (looked in {folder})"
        )
    return newest


def _weights_in(folder: Path, weights: str) -> Path:
    """Return the file of a checkpoint that holds the weights asked for. Its manifest lists it."""
    names = signed(folder)
    present = {
        kind: folder / name for kind, stem in WEIGHT_FILES.items() if (name := f"{stem}.safetensors") in names
    }
    kind = ("ema" if "ema" in present else "live") if weights == "auto" else weights
    if kind not in present:
        raise CheckpointError(f"{folder}: holds no {kind} weights; nearest: weights=auto")
    return present[kind]


def _found(file: Path) -> Found:
    folder = file.parent if (file.parent / MANIFEST).exists() and file.name in signed(file.parent) else None
    run = None
    if folder is not None and (parent := folder.resolve().parent).name == FOLDER:
        run = parent.parent
    return Found(file, folder, run, "ema" if file.stem == WEIGHT_FILES["ema"] else "live")
