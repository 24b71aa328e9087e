"""Read tar files: they give the samples of the folder they were made of, and the classes of every layout."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepvit_train.commands import evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.data import cache
from deepvit_train.data.dataset import ImageDataset
from deepvit_train.data.decode import BadImageError, Limits
from deepvit_train.data.index import ImageIndex, open_split, scan_tars
from deepvit_train.data.loader import Loader, LoaderOptions
from deepvit_train.data.order import TrainOrder
from deepvit_train.data.transform import train_transform
from deepvit_train.error import DataError
from tests.conftest import QUICK
from tests.data.test_loader import hashes
from tests.watch import watching

LIMITS = Limits(max_bytes=10**6, max_pixels=10**6)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def seen(index: ImageIndex) -> list[tuple[str, str, int]]:
    """Class, path and the first pixel's red of each image."""
    contents = [Image.open(io.BytesIO(index.read(image, 10**6))) for image in range(len(index))]
    return [
        (index.classes[index.targets[image]], index.path(image), content.getpixel((0, 0))[0])
        for image, content in enumerate(contents)
    ]


@pytest.fixture
def packed(image_folder: Path, tmp_path: Path) -> Path:
    """The folder's splits as one tar file each."""
    root = tmp_path / "packed"
    root.mkdir()
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as archive:
            archive.add(image_folder / split, ".")
    return root


def test_samples_are_those_of_the_folder(image_folder: Path, packed: Path) -> None:
    config = compose_command("train", ["augment=deit"])
    found = []
    for name, root in (("imagefolder", image_folder), ("tar", packed)):
        data = compose_command("train", [f"data={name}", f"data.root={root}"]).data
        transform = train_transform(config.model.preprocessing, config.augment)
        dataset = ImageDataset(open_split(data, "train"), transform, 0, LIMITS, 0)
        for workers in (0, 2):
            order = TrainOrder(24, batch_size=6, accumulate=1, steps_per_epoch=4, steps=range(1, 7), seed=0)
            loader = Loader(dataset, order, LoaderOptions(workers, torch.device("cpu")), [0.5] * 3, [0.5] * 3)
            found.append(hashes(list(loader)))
            loader.close()
    assert found[0] == found[1] == found[2] == found[3]


def test_a_run_trains_on_tar_files_as_on_the_folder(image_folder: Path, packed: Path, tmp_path: Path) -> None:
    overrides = [*QUICK, "trainer.batch_size=8", "attn=self"]
    metrics = []
    for name, root in (("imagefolder", image_folder), ("tar", packed)):
        run_dir = f"run_dir={tmp_path / name}"
        done = train.run(compose_command("train", [*overrides, f"data={name}", f"data.root={root}", run_dir]))
        metrics.append({key: value for key, value in done.items() if key.startswith("val")})
    assert metrics[0] == metrics[1]
    report = evaluate.run(
        compose_command("eval", [f"checkpoint={tmp_path}/tar", "threads=1", "report=false"])
    )
    assert (report["images"], report["data"]) == (9, "tar")


def test_classes_are_folders_files_of_labels_or_tar_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-000001.tar", "w") as archive:
        for number, label in ((3, "10"), (1, "9")):
            add(archive, f"{number:04d}.cls", label.encode())
            add(archive, f"{number:04d}.png", png(number))
            add(archive, f"{number:04d}.json", b"{}")
    with tarfile.open(tmp_path / "train-000000.tar", "w") as archive:
        add(archive, "0002.png", png(2))
        add(archive, "0002.cls", b"9\n")
        add(archive, "._0002.png", b"")
    index = scan_tars(tmp_path, "train")
    assert index.classes == ["10", "9"]  # as folders of these names are sorted
    assert [(label, red) for label, _, red in seen(index)] == [("10", 3), ("9", 2), ("9", 1)]
    assert index.path(1) == f"{tmp_path}/train-000000.tar/0002.png"

    (tmp_path / "val").mkdir()
    for label in ("n02", "n01"):
        with tarfile.open(tmp_path / "val" / f"{label}.tar", "w") as archive:
            add(archive, f"{label}_7.JPEG", png(7))
    assert [label for label, *_ in seen(scan_tars(tmp_path, "val"))] == ["n01", "n02"]


@pytest.mark.parametrize("above", ["", "./", "train/", "data/train/"])
@pytest.mark.parametrize("within", ["", "images/"])
def test_a_class_is_the_first_folder_below_those_all_share(tmp_path: Path, above: str, within: str) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, label in enumerate(("ant", "bee")):
            add(archive, f"{above}{label}/{within}{number}.png", png(number))
            add(archive, f"{above}{label}/.thumbs/{number}.png", png(9))
        add(archive, f"{above}ant/{within}odd/2.png", png(2))
    assert [(label, red) for label, _, red in seen(scan_tars(tmp_path, "train"))] == [
        ("ant", 0),
        ("ant", 2),
        ("bee", 1),
    ]


def test_shards_of_one_class_each_are_told_apart(tmp_path: Path) -> None:
    for number, label in enumerate(("ant", "bee")):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as archive:
            add(archive, f"{label}/{number}.png", png(number))
    assert scan_tars(tmp_path, "train").classes == ["ant", "bee"]


def test_labels_count_where_all_images_lie_in_one_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number, label in enumerate(("7", "5")):
            add(archive, f"train/{number}.png", png(number))
            add(archive, f"train/{number}.cls", label.encode())
    assert [(label, red) for label, _, red in seen(scan_tars(tmp_path, "train"))] == [("5", 1), ("7", 0)]


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for red in (1, 2):
            add(archive, "ant/0.png", png(red))
    assert [red for *_, red in seen(scan_tars(tmp_path, "train"))] == [2]


def test_a_sparse_member_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("ant/0.bmp")
        member.size = 10
        member.pax_headers = {"GNU.sparse.size": "10", "GNU.sparse.map": "0,10", "GNU.sparse.numblocks": "1"}
        archive.addfile(member, io.BytesIO(bytes(10)))
    with pytest.raises(DataError, match=r"train\.tar: ant/0\.bmp is stored as a sparse file"):
        scan_tars(tmp_path, "train")


def test_what_is_wrong_is_named(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tar files of test: test\.tar"):
        scan_tars(packed, "test")
    whole = (packed / "val.tar").read_bytes()
    for content in (b"", b"no tar file", whole[: len(whole) // 2]):
        (packed / "val.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"val\.tar"):
            scan_tars(packed, "val")
    with tarfile.open(packed / "val.tar", "w:gz") as archive:
        add(archive, "ant/0.png", png(1))
    with pytest.raises(DataError, match="uncompressed"):
        scan_tars(packed, "val")


def test_a_bad_image_in_a_tar_file_is_bad(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for name, content in (
            ("empty", b""),
            ("large", bytes(10**6 + 1)),
            ("text", b"text"),
            ("good", png(1)),
        ):
            add(archive, f"ant/{name}.png", content)
    index = scan_tars(tmp_path, "train")
    config = compose_command("train", [])
    transform = train_transform(config.model.preprocessing, config.augment)
    order = TrainOrder(4, batch_size=4, accumulate=1, steps_per_epoch=1, steps=range(1), seed=0)
    (keys,) = order
    batch = ImageDataset(index, transform, 0, LIMITS, replacements=9).__getitems__(keys)
    assert {line.split(": ")[0].rpartition("/")[2] for line in batch.bad} == {
        "empty.png",
        "large.png",
        "text.png",
    }
    with (tmp_path / "train.tar").open("r+b") as opened:
        opened.truncate(600)
    with pytest.raises(BadImageError, match=r"good\.png: cut short: 0 of"):
        index.read(1, 10**6)


def test_many_tar_files_are_not_all_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepvit_train.data.tar.OPEN_FILES", 3)
    (tmp_path / "train").mkdir()
    for number in range(9):
        with tarfile.open(tmp_path / "train" / f"{number}.tar", "w") as archive:
            add(archive, "ant/0.png", png(number))
    index = scan_tars(tmp_path, "train")
    for image in np.random.default_rng(0).permutation(np.repeat(np.arange(9), 3)).tolist():
        assert index.read(image, 10**6) == png(image)
    open_now = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert len([file for file in open_now if file.parent == tmp_path / "train"]) == 3


def test_the_index_is_kept_until_a_tar_file_changes(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "COARSEST_TICK_S", -3600.0)
    opened: list[str] = []
    with watching(packed, opened.append):
        first = scan_tars(packed, "train")
        assert str(packed / "train.tar") in opened
        opened.clear()
        second = scan_tars(packed, "train")
        assert str(packed / "train.tar") not in opened
    assert seen(second) == seen(first)
    with tarfile.open(packed / "train.tar", "a") as archive:
        add(archive, "./bee/new.png", png(200))
    assert len(seen(scan_tars(packed, "train"))) == 25
