"""Write Fashion-MNIST from idx files: every image lies under its class, and every fault is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.data.fashion_mnist import CLASSES, DEBIAN_FOLDER, read_idx, write_fashion_mnist
from deepvit_train.error import DataError

RNG = np.random.default_rng(0)
IMAGES = {
    "train": RNG.integers(0, 256, (23, 28, 28), np.uint8),
    "t10k": RNG.integers(0, 256, (11, 28, 28), np.uint8),
}
LABELS = {"train": np.arange(23, dtype=np.uint8) % 10, "t10k": np.arange(11, dtype=np.uint8) % 10}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "idx"
    folder.mkdir()
    for part in IMAGES:
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(IMAGES[part]))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[part])))
    return folder


def test_every_image_lies_under_its_class(tmp_path: Path, source: Path) -> None:
    assert write_fashion_mnist(tmp_path / "out", source) == {"train": 23, "val": 11}
    for split, part in (("train", "train"), ("val", "t10k")):
        files = sorted((tmp_path / "out" / split).rglob("*.png"), key=lambda file: file.stem)
        assert [CLASSES.index(file.parent.name) for file in files] == LABELS[part].tolist()
        assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), IMAGES[part])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", idx(IMAGES["train"])[:-1], "cut short"),
        ("train-images-idx3-ubyte", b"", "not an idx file"),
        ("train-images-idx3-ubyte", b"404 Not Found", "not an idx file"),
        ("train-images-idx3-ubyte", idx(IMAGES["train"][:5]), "23 labels"),
        ("train-images-idx3-ubyte", idx(IMAGES["train"][:, :20]), r"shape \(23, 20, 28\)"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS["t10k"]), mtime=0)[:-9], "can't be read"),
        ("t10k-labels-idx1-ubyte.gz", b"no gzip", "can't be read"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(LABELS["t10k"] + 1), mtime=0), "labels up to 10"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, source: Path, name: str, content: bytes, message: str) -> None:
    (source / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        write_fashion_mnist(tmp_path / "out", source)


def test_a_missing_file_is_named(tmp_path: Path, source: Path) -> None:
    (source / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match=r"neither t10k-images-idx3-ubyte nor .* dataset-fashion-mnist"):
        write_fashion_mnist(tmp_path / "out", source)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="the Debian package dataset-fashion-mnist is missing")
def test_the_debian_package_is_fashion_mnist() -> None:
    images = read_idx(DEBIAN_FOLDER / "t10k-images-idx3-ubyte.gz", dims=3)
    labels = read_idx(DEBIAN_FOLDER / "t10k-labels-idx1-ubyte.gz", dims=1)
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10


def test_an_idx_file_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as packed:
        for _ in range(5):
            packed.write(bytes(2**24))
    with pytest.raises(DataError, match="more than 67108864 bytes"):
        read_idx(tmp_path / "train-images-idx3-ubyte.gz", dims=3)


def test_a_source_with_a_name_too_long_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x{256}: holds neither"):
        write_fashion_mnist(tmp_path / "out", tmp_path / ("x" * 256))
