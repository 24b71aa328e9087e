"""A file that holds no weights, or more than weights, is called what it is, and nothing of it is run."""

from __future__ import annotations

import bz2
import collections
import datetime
import functools
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deepvit_train.error import CheckpointError
from deepvit_train.models import load_model

STATE = {"a.weight": torch.zeros(3)}


class Runs:
    """What unpickling would run."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def told(file: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(file)
    said = str(error.value)
    assert said.startswith(f"{file}: ")
    assert len(said.splitlines()) == 1
    return said.removeprefix(f"{file}: ")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (np.float64(0.5), "numpy._core.multiarray.scalar"),
        (np.zeros(3), "numpy._core.multiarray._reconstruct"),
        (datetime.datetime(2025, 1, 1), "datetime.datetime"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (functools.partial(print, 1), "functools.partial"),
        (Path("x"), "pathlib.PosixPath"),
        (nn.ReLU(), "torch.nn.modules.activation.ReLU"),
        (Runs(eval, "1"), "eval"),
        (Runs(Path.touch, Path("SENTINEL")), "getattr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_global_in_the_way_is_named(
    content: object, name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file.pth"
    torch.save({"model": STATE, "more": content}, file, _use_new_zipfile_serialization=zipped)
    assert told(file).startswith(f"holds more than tensors ({name}), and nothing of it was executed")
    assert not (tmp_path / "SENTINEL").exists()


def archive_of(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr("a/b\x1b.pth", "x")
    elif kind == "npz":
        np.savez(file, a=np.zeros(3))
    else:
        with tarfile.open(fileobj=file, mode="w:gz" if kind == "tgz" else "w") as opened:
            opened.addfile(tarfile.TarInfo("model.pth"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (archive_of("tar"), "a tar archive; unpack it"),
        (archive_of("tgz"), "a gzip archive; unpack it"),
        (gzip.compress(b"x"), "a gzip archive; unpack it"),
        (bz2.compress(b"x"), "a bzip2 archive; unpack it"),
        (lzma.compress(b"x"), "an xz archive; unpack it"),
        (archive_of("zip"), "a zip archive of other files (a/b\\x1b.pth); unpack it"),
        (archive_of("npz"), "arrays of NumPy (.npz)"),
        (b"\x93NUMPY\x01\x00", "an array of NumPy"),
        (pickle.dumps({"a": np.zeros(3)}), "a pickle that torch.save did not write"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b'{"weight_map": {}}', "a JSON file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file"),
        (b"GGUF" + bytes(99), "a GGUF file"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "a JPEG image"),
        (bytes(range(99, 199)), "not a weights file: neither safetensors nor what torch.save writes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_something_else_is_called_what_it_is(
    content: bytes, what: str, tmp_path: Path
) -> None:
    for name in ("model.pth.tar", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert told(tmp_path / name).startswith(what)


def test_programs_of_torch_are_called_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), file)
    assert told(file).startswith("a program of torch.export")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_called_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(file))
    assert told(file).startswith("a TorchScript archive")
