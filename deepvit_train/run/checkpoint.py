"""Checkpoints: a folder each, of safetensors and JSON, with a SHA-256 manifest written last.

    RUN/checkpoints/step_0000100/   model, ema, optimizer, calibrated .safetensors; state.json; manifest.json
    RUN/checkpoints/last, best      links to two of them

Here they are found, verified and read; saving.py writes them. Nothing is pickled, and nothing read back is
executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from deepvit_train.error import CheckpointError, nearest

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SET_ASIDE = "-before"  # ends the name of a checkpoint while another of its step takes its place
WEIGHT_FILES = {"live": "model", "ema": "ema"}  # stems of the files of a checkpoint that hold a whole model
DESCRIPTION = "deepvit_train"  # the key of the safetensors header that holds the model's description as JSON


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder by the step in their names, oldest first; the clock plays no part."""
    found = {
        path: int(step)
        for path in folder.glob("step_*")
        if (step := path.name[5:].removesuffix(SET_ASIDE)).isdigit() and path.is_dir()
    }
    return sorted(found, key=lambda path: (found[path], not path.name.endswith(SET_ASIDE)))


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are named to `warn` and passed over."""
    for path in reversed(checkpoints_in(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
        else:
            return path
    return None


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless every file has the digest that the manifest says."""
    manifest = _read_json(path / MANIFEST)
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or STATE not in digests or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: not a manifest of format {FORMAT}")
    # Nothing vouches for the manifest but its own text, which is written in one way only.
    if (path / MANIFEST).read_text() != as_json(manifest):
        raise CheckpointError(f"{path / MANIFEST}: damaged checkpoint (not as it was written)")
    for name, digest in digests.items():
        file = path / name
        if Path(name).name != name or file.is_symlink():
            raise CheckpointError(f"{path / MANIFEST}: names {name!r}, which is not a file of the checkpoint")
        try:
            found = digest_of(file)
        except OSError as error:
            raise CheckpointError(f"{file}: damaged checkpoint ({error.strerror})") from None
        if found != digest:
            raise CheckpointError(f"{file}: damaged checkpoint (its SHA-256 is not the manifest's)")


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises CheckpointError where a newer format wrote it."""
    state = _read_json(path / STATE)
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {state.get('format')!r}; this version reads {FORMAT}")
    return state


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read ({error})") from None


def read_calibrated(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The calibrated statistics of a checkpoint folder, for live and ema weights; empty where it has none."""
    file = checkpoint / "calibrated.safetensors"
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in (read_tensors(file) if file.exists() else {}).items():
        name, _, buffer = key.partition(".")
        found.setdefault(name, {})[buffer] = value
    return found


def read_description(file: Path) -> dict[str, Any] | None:
    """The model's description in a safetensors file's header; None in a file of another program.

    Raises CheckpointError.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a weights file that can be read ({error})") from None
    if DESCRIPTION not in header:
        return None
    try:
        description = json.loads(header[DESCRIPTION])
    except ValueError:
        raise CheckpointError(f"{file}: its header does not describe a model of deepvit-train") from None
    if not isinstance(description, dict):
        raise CheckpointError(f"{file}: its header does not describe a model of deepvit-train")
    return description


def find(path: str, prefer: str = "best") -> Path:
    """What `checkpoint=PATH` means: a verified checkpoint folder, or a weights file.

    A run folder stands for its best checkpoint, else, or if one prefers the 'last', its newest whole one; a
    folder of deepvit-convert for its weights file. Raises CheckpointError.
    """
    given = _followed(Path(path).expanduser())
    if given.is_file():
        return given
    if not given.is_dir():
        siblings = [entry.name for entry in given.parent.iterdir()] if given.parent.is_dir() else []
        raise CheckpointError(f"checkpoint={path}: no such file or folder{nearest(given.name, siblings)}")
    if (given / MANIFEST).exists() or (given / STATE).exists():
        verify(given)
        return given
    if (converted := given / f"{WEIGHT_FILES['live']}.safetensors").is_file():
        return converted
    folder = given if given.name == "checkpoints" else given / "checkpoints"
    if prefer == "best" and (best := _followed(folder / "best")).exists():
        best = best.resolve()
        verify(best)
        return best
    problems: list[str] = []
    newest = newest_valid(folder, problems.append)
    if newest is None:
        raise CheckpointError(
            problems[0] if problems else f"checkpoint={path}: holds no checkpoint (looked in {folder})"
        )
    return newest


def _followed(path: Path) -> Path:
    """The path; where it is a link whose checkpoint a kill left set aside, that one."""
    aside = Path(f"{path.resolve()}{SET_ASIDE}") if path.is_symlink() else path
    return aside if not path.exists() and aside.exists() else path


def find_weights(path: str, weights: str = "auto") -> Path:
    """The weights file that a path means: itself, or the one of the checkpoint that `find` finds.

    Args:
        weights: 'live', 'ema', or 'auto' for the averaged weights where a checkpoint has both.
    """
    found = find(path)
    if found.is_file():
        return found
    present = {
        name: file for name, stem in WEIGHT_FILES.items() if (file := found / f"{stem}.safetensors").exists()
    }
    kind = ("ema" if "ema" in present else "live") if weights == "auto" else weights
    if kind not in present:
        raise CheckpointError(f"{found}: holds no {kind} weights; nearest: weights=auto")
    return present[kind]


def kind_of(file: Path) -> str:
    """Whether a safetensors file of a checkpoint holds 'live' or 'ema' weights, by its name."""
    return "ema" if file.stem == WEIGHT_FILES["ema"] else "live"


def calibrated_beside(file: Path) -> dict[str, Tensor] | None:
    """The calibrated statistics of a checkpoint's weights file; None where it is on its own or has none."""
    if not (file.parent / MANIFEST).exists():
        return None
    return read_calibrated(file.parent).get(kind_of(file))


def digest_of(path: Path, flush: bool = False) -> str:
    """The SHA-256 of a file; with `flush` once it is on the disk."""
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def as_json(content: dict[str, Any]) -> str:
    """The one way in which JSON files of a checkpoint are written."""
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise CheckpointError(f"{path}: damaged checkpoint ({reason})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged checkpoint (not a JSON object)")
    return content
