"""Read the tensors of any weights file. Nothing in a file is executed, and no size in it is believed.

The file may be safetensors, or what torch.save wrote: its zip format, or its format before torch 1.6. Or
it is one of Google's .npz files.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepvit_train.error import CheckpointError
from deepvit_train.models.importer.kind import SAVE_TENSORS, not_weights
from deepvit_train.models.importer.network import networks_in
from deepvit_train.models.importer.npz import is_vision, read_arrays
from deepvit_train.reading import open_file
from deepvit_train.run.description import ModelDescription, read_description
from deepvit_train.run.found import Found
from deepvit_train.run.tensor import listed, read_tensors

# The keys under which training programs save their tensors, averaged weights first.
# DINO saves a teacher and its student, I-JEPA a target encoder and its encoder.
WRAPPERS = {
    "ema": ("teacher", "target_encoder", "model_ema", "state_dict_ema"),
    "live": ("student", "encoder", "model", "state_dict"),
}


NAME = 300  # letters of a tensor's name, far more than any program writes


@dataclass(frozen=True)
class Source:
    """The tensors of a file under the names that they have there.

    Args:
        weights: 'live' or 'ema', whichever was read.
        tensors: the tensors on the CPU, by name.
        description: what a file of this project says about its model; None for a file of another program.
        left_out: names of the tensors of a student beside a teacher, or of the teacher.
    """

    weights: str
    tensors: dict[str, Tensor]
    description: ModelDescription | None
    left_out: list[str] = field(default_factory=list)


def read_source(found: Found, weights: str = "auto") -> Source:
    """Read a weights file. Raises CheckpointError.

    Args:
        found: the file, and which weights its name stands for.
        weights: which weights to take from a file of torch.save that holds both: 'live', 'ema', or 'auto' for
            the averaged ones.
    """
    file = found.file
    try:
        with open_file(file, follow=True) as opened:
            start = opened.read(512)
        if (other := not_weights(file, start)) is not None:
            raise CheckpointError(f"{file}: {other}")
        if start[8:9] == b"{":
            tensors, description = read_tensors(file), read_description(file)
            if description is not None:
                return Source(found.kind, _checked(file, tensors), description)
            content: Any = tensors
        else:
            content = _load_zip(file) if start[:2] == b"PK" else _load_legacy(file)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"(?:GLOBAL|[Uu]nsupported class|function) ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file}: holds more than tensors{f' ({what[1]})' if what else ''}, and nothing of it was "
            f"executed; {SAVE_TENSORS}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror or error})") from None
    except Exception as error:  # torch's readers raise anything for a damaged file
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{file}: not a weights file, or a damaged one ({reason[0] if reason else type(error).__name__})"
        ) from None
    kind, tensors = _unwrapped(file, content, weights)
    inner, tensors, left_out = networks_in(file, _checked(file, tensors), weights)
    if "ema" in (kind, inner) and weights == "live":
        raise CheckpointError(f"{file}: holds no live weights; nearest: weights=auto")
    if weights == "ema" and "ema" not in (kind, inner):
        raise CheckpointError(f"{file}: holds no ema weights; nearest: weights=auto")
    return Source("ema" if "ema" in (kind, inner) else kind, tensors, None, left_out)


def _load_zip(file: Path) -> Any:
    """Read an .npz file, or torch.save's format since 1.6, whose tensors stay on the disk until copied."""
    with zipfile.ZipFile(file) as archive:
        names = [entry.filename for entry in archive.infolist()]
        claimed = sum(entry.file_size for entry in archive.infolist())
    if is_vision(names):
        return read_arrays(file)
    if claimed > file.stat().st_size:
        raise CheckpointError(f"{file}: claims {claimed:,} bytes of content, but has {file.stat().st_size:,}")
    return _load(file, mmap=True)


def _load_legacy(file: Path) -> Any:
    """Read torch.save's format before 1.6.

    Loading takes as much memory as the file claims, so the claim is compared with the file's size first.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        claimed = sum(tensor.nbytes for tensor in _tensors_in(_load(file)))
    if claimed > 2 * file.stat().st_size:  # tied tensors are counted twice
        raise CheckpointError(f"{file}: claims {claimed:,} bytes of tensors, but has {file.stat().st_size:,}")
    return _load(file)


def _load(file: Path, **options: Any) -> Any:
    # Training scripts save their parsed arguments too; a Namespace runs no code.
    allowed = torch.serialization.safe_globals([argparse.Namespace])
    with allowed, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the old format
        return torch.load(file, map_location="cpu", weights_only=True, **options)


def _tensors_in(content: Any) -> list[Tensor]:
    if isinstance(content, Tensor):
        return [content]
    values = content.values() if isinstance(content, Mapping) else content
    return [tensor for each in values for tensor in _tensors_in(each)] if _is_container(content) else []


def _is_container(content: Any) -> bool:
    return isinstance(content, (Mapping, list, tuple))


def _unwrapped(file: Path, content: Any, weights: str) -> tuple[str, dict[str, Any]]:
    """Return the kind of weights, 'live' or 'ema', and the state dict inside a saved object."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, not named tensors")
    wrapped = {
        kind: content[key]
        for kind, keys in WRAPPERS.items()
        for key in keys
        if isinstance(content.get(key), Mapping)
    }
    if not wrapped:
        wrapped = {"live": content}
    kind = next(iter(wrapped)) if weights == "auto" else weights
    if kind not in wrapped:
        if len(wrapped) > 1 or kind == "live":
            raise CheckpointError(f"{file}: holds no {weights} weights; nearest: weights=auto")
        kind = next(iter(wrapped))  # a teacher may be inside
    return kind, dict(wrapped[kind])


def _checked(file: Path, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Check that there are named tensors, each as large as it claims."""
    strangers = [ascii(name)[:NAME].strip("'") for name, each in tensors.items() if not _is_plain(name, each)]
    if not tensors or strangers:
        raise CheckpointError(
            f"{file}: {listed('not named, dense tensors', strangers) or 'holds no tensors'}"
        )
    return tensors


def _is_plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()  # it stands in messages of one line
        and len(name) <= NAME
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.nbytes <= value.untyped_storage().nbytes()  # a view may claim any size without holding it
    )
