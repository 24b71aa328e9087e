"""Tells what a file is, by how it begins, where it is no file of weights. Nothing in it is executed."""

from __future__ import annotations

import zipfile
from pathlib import Path

from deepvit_train.models.importer.npz import is_vision

SAVE_TENSORS = "save its state_dict alone"
UNPACK = "unpack it, and name the weights file inside"
# torch.save's number at the start of its format before 1.6, as pickle writes it.
LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))

# Place, bytes that stand there, what such a file is, and what helps.
SIGNS = (
    (257, b"ustar", "a tar archive", UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ\x00", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (0, b"Rar!", "a rar archive", UNPACK),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes it", "convert it to a state_dict of torch first"),
    (0, b"\x93NUMPY", "an array of NumPy", SAVE_TENSORS),
    (0, b"GGUF", "a GGUF file", "convert it to a state_dict of torch first"),
    (
        0,
        b"version https://git-lfs",
        "a pointer of Git LFS, not the file itself",
        "fetch it with git lfs pull",
    ),
    (0, b"<", "a web page or XML, perhaps of a download that failed", "download the file again"),
    (0, b"{", "a JSON file", "name the file that holds the tensors"),
    (0, b"\xff\xd8\xff", "a JPEG image", "name a weights file"),
    (0, b"\x89PNG", "a PNG image", "name a weights file"),
    (0, b"%PDF", "a PDF file", "name a weights file"),
)


def not_weights(file: Path, start: bytes) -> str | None:
    """Return what a file is that can't hold weights, and what helps; None for one that may.

    Args:
        file: where it lies.
        start: its first 512 bytes or more.

    Raises OSError and zipfile.BadZipFile for an archive that can't be read.
    """
    if not start:
        return "an empty file; perhaps it was not copied to its end"
    if start[8:9] == b"{":
        return None
    if start.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            return _other_archive([entry.filename for entry in archive.infolist()])
    if start.startswith(PICKLE):
        return None if LEGACY in start[:64] else f"a pickle that torch.save did not write; {SAVE_TENSORS}"
    for place, sign, what, help in SIGNS:
        if start[place:].startswith(sign):
            return f"{what}; {help}"
    return "not a weights file: neither safetensors nor what torch.save writes"


def _other_archive(names: list[str]) -> str | None:
    """Return what a zip archive is that torch.save did not write."""
    inside = [name.partition("/")[2] for name in names]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inside):
        return f"a TorchScript archive, which holds a program; {SAVE_TENSORS}"
    if "data.pkl" in inside:
        return None
    if any(name == "archive_format" or name.startswith("models/") for name in inside):
        return f"a program of torch.export; {SAVE_TENSORS}"
    if names and all(name.endswith(".npy") for name in names):
        if is_vision(names):
            return None
        return f"arrays of NumPy (.npz), not of Google's vision transformers; {SAVE_TENSORS} with torch"
    shown = ", ".join(ascii(name)[1:-1] for name in names[:3])  # a name may hold anything
    return f"a zip archive of other files ({shown or 'none'}); {UNPACK}"
