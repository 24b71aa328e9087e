"""Tensors of a safetensors file, and whether they are those that a model has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deepvit_train.console import first_of
from deepvit_train.error import CheckpointError
from deepvit_train.reading import open_file

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
RUNNING = ("running_mean", "running_var")
SHOWN = 8  # names in a message


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, onto the CPU. Raises CheckpointError."""
    try:
        open_file(file, follow=True).close()  # a pipe is refused here
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: can't be read ({error})") from None
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        # The library does not know every number type that the format has.
        raise CheckpointError(f"{file}: holds tensors that can't be read ({error})") from None


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors, by their names and bytes, whatever file they are in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_fit(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], exact: bool = False) -> None:
    """Raise CheckpointError listing each name that is missing, left over, of another shape or number type.

    Args:
        exact: the number types must be the same. Otherwise any of 16 to 64 bits can stand for a float.
    """
    both = [name for name in expected if name in tensors]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}"
        for name in both
        if tensors[name].shape != expected[name].shape
    ]
    types = [
        f"{name} is {_named(tensors[name])}, not {_named(expected[name])}"
        for name in both
        if not _same_type(expected[name], tensors[name], exact)
    ]
    problems = [
        listed("missing", [name for name in expected if name not in tensors]),
        listed("not read", [name for name in tensors if name not in expected]),
        listed("of another shape", shapes),
        listed("of another number type", types),
    ]
    if any(problems):
        raise CheckpointError(
            f"does not fit the model ({'; '.join(problem for problem in problems if problem)})"
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError listing each tensor that holds NaN or infinity.

    Running statistics are left out: a batch that overflowed in fp16 and was skipped may have left them there,
    and training goes on without them.
    """
    odd = [name for name, each in tensors.items() if not name.endswith(RUNNING) and not is_finite(each)]
    if odd:
        raise CheckpointError(listed("holds NaN or infinite values", odd))


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite.

    A sum tells it in one pass: such a value stays in it. A sum can overflow too, so then each value is asked.
    """
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def listed(what: str, names: Iterable[str]) -> str:
    """Return 'what: a, b, ... 3 more', or an empty text if there are no names."""
    names = list(names)
    return f"{what}: {first_of(names, SHOWN)}" if names else ""


def _same_type(expected: Tensor, tensor: Tensor, exact: bool) -> bool:
    if exact:
        return tensor.dtype == expected.dtype
    return tensor.dtype in (FLOATS if expected.is_floating_point() else WHOLE)


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
