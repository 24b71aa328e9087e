"""Write Fashion-MNIST as an ImageFolder of PNGs, from its idx files (Xiao et al., arXiv 1708.07747)."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from deepvit_train.atomic import create, make_folder
from deepvit_train.error import DataError

# Where the Debian package dataset-fashion-mnist puts the files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PARTS = {"train": "train", "val": "t10k"}
# Class folders are sorted by name, so the number in front keeps the published labels.
CLASSES = [
    "0-t-shirt-top",
    "1-trouser",
    "2-pullover",
    "3-dress",
    "4-coat",
    "5-sandal",
    "6-shirt",
    "7-sneaker",
    "8-bag",
    "9-ankle-boot",
]
SIDE = 28
LARGEST = 2**26  # bytes of an idx file


def write_fashion_mnist(root: Path, source: Path | None = None) -> dict[str, int]:
    """Write root/{train,val}/CLASS/NUMBER.png, where NUMBER is the image's place in its idx file.

    Without a source it reads the files of the Debian package. Returns the number of images of each split.

    Raises:
        DataError: a file is missing, or is not Fashion-MNIST's.
    """
    source = DEBIAN_FOLDER if source is None else source
    written = {}
    for split, part in PARTS.items():
        images = read_idx(_file(source, f"{part}-images-idx3-ubyte"), dims=3)
        labels = read_idx(_file(source, f"{part}-labels-idx1-ubyte"), dims=1)
        if images.shape != (len(labels), SIDE, SIDE) or labels.max(initial=0) >= len(CLASSES):
            raise DataError(
                f"{source}: {part} holds images of shape {images.shape} and {len(labels)} labels up to "
                f"{labels.max(initial=0)}; expected (N, {SIDE}, {SIDE}), N labels up to {len(CLASSES) - 1}"
            )
        folders = [make_folder(root, split, name) for name in CLASSES]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            with create(folders[label] / f"{number:05d}.png") as file:
                Image.fromarray(image).save(file, "PNG")
        written[split] = len(images)
    return written


def read_idx(file: Path, dims: int) -> np.ndarray:
    """Read an idx file of unsigned bytes with `dims` dimensions, gzipped or not. Raises DataError."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: can't be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > LARGEST:
        raise DataError(f"{file}: more than {LARGEST} bytes; Fashion-MNIST's files have at most 47,040,016")
    start = 4 * (1 + dims)
    shape = np.frombuffer(content[4:start].ljust(start - 4, b"\0"), dtype=">u4").astype(np.int64)
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) - start != shape.prod():
        raise DataError(f"{file}: not an idx file of unsigned bytes with {dims} dimensions, or cut short")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _file(source: Path, name: str) -> Path:
    for file in (source / name, source / f"{name}.gz"):
        if os.path.isfile(file):  # noqa: PTH113 - Path's raises for a name that is too long
            return file
    raise DataError(
        f"{source}: holds neither {name} nor {name}.gz; install the Debian package dataset-fashion-mnist, "
        "or give source=FOLDER with Fashion-MNIST's four idx files"
    )
