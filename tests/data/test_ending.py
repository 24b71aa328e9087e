"""Every file is an image that is read, or is counted among those left out."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.config.compose import compose_command
from deepvit_train.data.check import list_split, statistics_of
from deepvit_train.data.decode import ENDINGS, FORMATS, Limits
from deepvit_train.data.ending import as_names, ending_of, from_names, is_image, split_hint, summed_up
from deepvit_train.data.index import ImageIndex, scan_split, scan_tars
from deepvit_train.error import DataError
from tests.conftest import QUICK, Command
from tests.data.picture import open_picture

LIMITS = Limits(max_bytes=10**7, max_pixels=10**6)
# What people keep photographs in, and torchvision's ImageFolder passes over.
ALSO = (".jfif", ".jpe", ".gif", ".avif", ".jp2", ".j2k", ".apng", ".dib", ".pbm", ".pnm", ".mpo", ".qoi")


def test_what_torchvision_reads_is_read_and_what_pillow_reads_too() -> None:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert set(IMG_EXTENSIONS) <= ENDINGS
    assert set(ALSO) - {".avif"} <= ENDINGS
    assert (".avif" in ENDINGS) == ("AVIF" in FORMATS)
    assert not ENDINGS & {".eps", ".ps", ".ico", ".icns", ".fits", ".pdf", ".mpg", ".h5", ".txt", ".npy"}


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_an_image_of_every_ending_is_found_and_read(tmp_path: Path, ending: str) -> None:
    """Written by Pillow under that very name, where this Pillow writes it."""
    file = tmp_path / "train" / "ant" / f"One.Two{ending.upper()}"
    file.parent.mkdir(parents=True)
    kind = Image.registered_extensions()[ending]
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    grey = ending in (".pbm", ".bw", ".pgm", ".pfm")
    image = Image.fromarray(np.full((16, 24) if grey else (16, 24, 3), 200, np.uint8))
    image.convert("1" if ending == ".pbm" else "L" if grey else "RGB").save(file, kind)
    index = scan_split(tmp_path, "train", False)
    assert (index.path(0), index.left_out) == (str(file), {})
    if ending != ".pfm":  # Pillow writes floats of 0..255 there
        pixels, _ = open_picture(index.path(0), LIMITS).pixels()
        assert pixels.shape == (16, 24, 3)
        assert pixels.mean() > 190


@pytest.mark.parametrize(
    ("name", "ending", "image"),
    [
        ("a.JPG", ".jpg", True),
        ("a.b.Jfif", ".jfif", True),
        ("a.txt", ".txt", False),
        ("jpg", "no ending", False),
        ("a.", ".", False),
        ("a.jpg~", ".jpg~", False),
        ("a.jpg\x1b[31m", ".jpg\\x1b[31m", False),
        ("photo.heic", ".heic", False),
    ],
)
def test_a_file_is_judged_by_what_follows_the_last_dot(name: str, ending: str, image: bool) -> None:
    assert ending_of(name) == ending
    assert is_image(name) == image


def test_counts_are_told_the_most_frequent_first_and_kept() -> None:
    counts = {f".{letter}": 1 for letter in "abcdefghij"} | {".heic": 1200, "no ending": 3}
    told = "1,200 .heic, 3 no ending, 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, 4 with other endings"
    assert summed_up(counts) == told
    from collections import Counter

    assert from_names(as_names(Counter(counts))) == counts


def strew(root: Path) -> dict[str, int]:
    """Put files that are no images among those of a split. Returns their counts."""
    for name in (
        "ant/a.txt",
        "ant/b.TXT",
        "bee/deep/c.heic",
        "cat/Thumbs.db",
        "cat/README",
        "d.csv",
        "e.png",
    ):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_bytes(b"x")
    (root / "train" / "cat" / ".hidden.txt").write_bytes(b"x")
    outside = {".csv": 1, ".png outside a class folder": 1}
    return {".txt": 2, ".heic": 1, ".db": 1, "no ending": 1, **outside}


def test_what_is_left_out_of_a_folder_is_counted_now_and_from_the_cache(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("deepvit_train.data.cache.COARSEST_TICK_S", -10.0)  # kept at once
    assert scan_split(image_folder, "train", False).told_of_left_out() is None
    counts = strew(image_folder)
    for _ in range(2):
        index = scan_split(image_folder, "train", False)
        assert index.left_out == counts
        assert len(index) == 24
        told = index.told_of_left_out() or ""
        assert told.startswith(
            f"{image_folder}/train: left out 7 files, not images that can be read: 2 .txt, 1 .csv"
        )
    data = compose_command("data-check", [f"root={image_folder}"]).data
    assert statistics_of(list_split(image_folder, data, "train"))["left_out"] == counts


def test_what_is_left_out_of_tar_files_is_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as opened:
        for name in ("ant/a.png", "ant/a.json", "bee/b.JFIF", "bee/c.heic", "bee/README", "bee/.x.txt"):
            opened.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("bee/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.JFIF"
        opened.addfile(link)
    index: ImageIndex = scan_tars(tmp_path, "train")
    assert len(index) == 2
    assert index.left_out == {".json": 1, ".heic": 1, "no ending": 1, "links": 1}


def test_a_class_of_other_files_alone_says_which(image_folder: Path) -> None:
    (image_folder / "train" / "dog").mkdir()
    (image_folder / "train" / "dog" / "1.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no image in class dog .*; left out: 1 \.heic"):
        scan_split(image_folder, "train", False)


@pytest.mark.runs
def test_a_run_and_an_evaluation_begin_with_it(call: Command, image_folder: Path) -> None:
    strew(image_folder)
    data = ["data=imagefolder", f"data.root={image_folder}", "augment=none", "trainer.batch_size=8"]
    said = call("train", *QUICK, *data, "run_dir=run").stdout.splitlines()
    assert said[1].startswith(f"{image_folder}/train: left out 7 files, not images that can be read: 2 .txt")
    assert not any("/val: left out" in line for line in said)
    said = call("eval", "run", *data[:2], "data.split=train", "threads=1", "report=false").stdout.splitlines()
    assert any("/train: left out 7 files, not images that can be read: 2 .txt" in line for line in said)


@pytest.mark.parametrize(
    ("split", "present", "hint"),
    [
        ("val", ["test", "train"], "; data.split=test evaluates on that"),
        ("val", ["test", "train", "valid"], "; data.split=valid evaluates on that"),
        ("val", ["train", "validation"], "; data.split=validation evaluates on that"),
        ("val", ["Val", "train"], "; data.split=Val evaluates on that"),
        ("val", ["train", "vall"], "; did you mean 'vall'?"),
        ("val", ["train", "images"], ""),
        ("val", ["train"], ""),
        ("train", ["Train", "val"], "; did you mean 'Train'? Rename it, or make train a link to it"),
        ("train", ["images", "val"], ""),
    ],
)
def test_the_key_that_takes_another_split_is_named(split: str, present: list[str], hint: str) -> None:
    assert split_hint(split, present) == hint


@pytest.mark.parametrize("name", ["test", "valid", "validation", "Val"])
def test_a_root_without_val_names_the_key(call: Command, image_folder: Path, name: str) -> None:
    (image_folder / "val").rename(image_folder / name)
    said = call("train", "data=imagefolder", f"data.root={image_folder}")
    assert said.returncode == 4
    assert f"data.split={name} evaluates on that" in said.stderr
    said = call("data", "check", str(image_folder), "timing=false")
    assert said.returncode == 4
    assert f"data.split={name} evaluates on that" in said.stderr


@pytest.mark.parametrize("file", ["test.tar", "valid/0.tar", "data-validation-000000.tar"])
def test_tar_files_without_val_name_the_key(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(DataError, match=r"data\.split=(test|valid|validation) evaluates on that"):
        scan_tars(tmp_path, "val")
