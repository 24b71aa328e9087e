"""Which run a checkpoint belongs to.

A run gets a random number when it begins. The number lies in RUN/identity.json and in each of the run's
checkpoints, which also say the run's name, the part of its configuration that may not change, and a digest of
its class names. So a checkpoint that was moved here from elsewhere, or renamed, is noticed. Checkpoints of
version 0.1.0 say nothing of the kind, and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepvit_train.atomic import write_text
from deepvit_train.config.alias import current
from deepvit_train.error import CheckpointError
from deepvit_train.reading import read_json
from deepvit_train.run.change import differences, unchanging

FILE = "identity.json"  # in the run's folder
KEY = "identity"  # in a checkpoint's state
FORMAT = 1


class ForeignError(CheckpointError):
    """A checkpoint that is not what its place says. It may be whole, so no older one takes its place."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint says of its run.

    Args:
        run: the run's random number, in hexadecimal digits.
        name: the run's name when the checkpoint was written.
        config: the part of the configuration that may not change, with dotted keys.
        classes: a digest of the names of the model's outputs, in order.
    """

    run: str
    name: str
    config: dict[str, Any]
    classes: str

    def plain(self) -> dict[str, Any]:
        """Return the identity as plain data, for a checkpoint's state."""
        return asdict(self)


def new_run() -> str:
    """Draw the number of a new run. It comes from the system, and changes no draw of the training."""
    return secrets.token_hex(8)


def build_identity(run: str, config: dict[str, Any], classes: Sequence[str]) -> Identity:
    """Build the identity of a run's checkpoints from its whole configuration, as nested plain data."""
    return Identity(run, str(config["name"]), unchanging(config), digest_of_names(classes))


def digest_of_names(names: Sequence[str]) -> str:
    """Return a digest of names and of their order."""
    return hashlib.blake2b(json.dumps(list(names)).encode(), digest_size=16).hexdigest()


def read_identity(state: dict[str, Any]) -> Identity | None:
    """Return what a checkpoint's state says of its run; None for a checkpoint of version 0.1.0."""
    said = state.get(KEY)
    return None if said is None else Identity(said["run"], said["name"], said["config"], said["classes"])


def read_run(folder: Path) -> str | None:
    """Return the number of a folder's run, or None for a run of version 0.1.0. Raises CheckpointError."""
    file = folder / FILE
    try:
        content = read_json(file)
        run = content["run"] if content["format"] == FORMAT else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, CheckpointError, KeyError, TypeError):
        run = None
    if not isinstance(run, str) or not re.fullmatch("[0-9a-f]{16}", run):
        raise CheckpointError(
            f"{file}: does not name a run; remove it if the checkpoints beside it are of one run"
        )
    return run


def write_run(folder: Path, run: str) -> None:
    """Store the number of the run in its folder. Raises OutputError."""
    write_text(folder / FILE, json.dumps({"format": FORMAT, "run": run}, indent=1) + "\n")


def check_place(checkpoint: Path, state: dict[str, Any]) -> None:
    """Raise ForeignError for a checkpoint inside a run that is of another step or run than its place says."""
    place = checkpoint.resolve()
    if place.parent.name != "checkpoints":
        return
    named = re.fullmatch(r"step_(\d+)(-before)?", place.name)
    if named and int(named[1]) != state.get("step"):
        raise ForeignError(
            f"{place}: holds step {state.get('step')}, not step {int(named[1])} as its name says; "
            "was it renamed?"
        )
    own, said = read_run(place.parent.parent), read_identity(state)
    if own is not None and said is not None and said.run != own:
        raise ForeignError(f"{place}: {_stranger(said)}, not to the one in this folder ({own}); move it away")
    if checkpoint.name == "best" and said is not None:
        best = state.get("best") or {}
        if best.get("step") != state.get("step"):
            raise ForeignError(
                f"{checkpoint}: leads to step {state.get('step')}, which was not the best one when it was "
                "saved; the next start of the training mends the link"
            )


def check_config(checkpoint: Path, said: Identity, config: dict[str, Any]) -> None:
    """Raise ForeignError for a checkpoint that was trained with another configuration than its run's.

    Args:
        config: what the run's config.yaml says, as nested plain data.
    """
    before = {key: current(key, value) for key, value in said.config.items()}
    # A key that another version brought or took away says nothing.
    now = {key: value for key, value in unchanging(config).items() if key in before}
    if changes := differences(before, now):
        told = "; ".join(
            f"{key}={before[key]}, where config.yaml says {now[key]}" for key in list(changes)[:3]
        )
        raise ForeignError(f"{checkpoint}: was trained with {told}; move it away")


def check_classes(checkpoint: Path, state: dict[str, Any], classes: Sequence[str]) -> None:
    """Raise ForeignError for a checkpoint whose state is of other classes than its weights."""
    said = read_identity(state)
    if said is not None and said.classes != digest_of_names(classes):
        raise ForeignError(f"{checkpoint}: its state is of other classes than its weights; it is not whole")


def check_runs(found: dict[Path, Identity]) -> None:
    """Raise ForeignError where the checkpoints of a folder are of several runs; the newest one comes last."""
    for checkpoint, said in found.items():
        newest = list(found.values())[-1]
        if said.run != newest.run:
            raise ForeignError(f"{checkpoint}: {_stranger(said)}, not to that of newer ones ({newest.run})")


def _stranger(said: Identity) -> str:
    return f"belongs to another run ({said.name!r}, {said.run})"
