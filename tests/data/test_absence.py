"""Take images and whole data sets away: one is a bad image, the other is waited for."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepvit_train.config.compose import compose_command
from deepvit_train.data import index as indexing
from deepvit_train.data import patience
from deepvit_train.data.absence import is_gone
from deepvit_train.data.dataset import ImageDataset, RawBatch
from deepvit_train.data.decode import Limits, UnreadableError, read_file
from deepvit_train.data.index import ImageIndex, scan_split, scan_tars
from deepvit_train.data.loader import Loader, LoaderOptions
from deepvit_train.data.order import EvalOrder
from deepvit_train.data.patience import DataLost, Patience, Readers, Wait, WaitInterrupted
from deepvit_train.data.source import ThreadSource
from deepvit_train.data.transform import eval_transform
from tests.data.test_bomb import END, PNG, member

LIMITS = Limits(10**7, 10**7)


def unreadable(index: ImageIndex, image: int) -> UnreadableError:
    with pytest.raises(UnreadableError) as error:
        index.read(image, 10**6)
    return error.value


def broken(files: set[str], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the disk fail for these files."""

    def read(path: str, max_bytes: int) -> bytes:
        if path in files:
            raise UnreadableError(path, OSError(number, os.strerror(number)))
        return read_file(path, max_bytes)

    monkeypatch.setattr(indexing, "read_file", read)


def test_a_deleted_image_is_missing_and_a_renamed_data_set_is_gone(image_folder: Path) -> None:
    index = scan_split(image_folder, "train", follow_links=False)
    Path(index.path(3)).unlink()
    assert not is_gone(index, 3, unreadable(index, 3))
    shutil.rmtree(image_folder / "train" / "bee")
    assert not is_gone(index, 10, unreadable(index, 10))
    (image_folder / "train").rename(image_folder / "away")
    assert is_gone(index, 0, unreadable(index, 0))
    (image_folder / "train").mkdir()  # what is left where something was mounted
    assert is_gone(index, 0, unreadable(index, 0))


def test_a_class_folder_that_is_a_link_to_nothing_is_gone(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "train" / "bee").rename(tmp_path / "bee")
    (image_folder / "train" / "bee").symlink_to(tmp_path / "bee")
    index = scan_split(image_folder, "train", follow_links=True)
    (tmp_path / "bee").rename(tmp_path / "away")
    assert is_gone(index, 10, unreadable(index, 10))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_an_error_of_the_disk_is_of_one_file_if_others_can_be_read(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    index = scan_split(image_folder, "train", follow_links=False)
    paths = [index.path(image) for image in range(len(index))]
    broken({paths[3]}, monkeypatch, number)
    assert not is_gone(index, 3, unreadable(index, 3))
    broken(set(paths), monkeypatch, number)
    assert is_gone(index, 3, unreadable(index, 3))


def test_a_tar_file_that_is_missing_is_gone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        (tmp_path / "train" / f"{name}.tar").write_bytes(member(f"{name}/x.png", PNG) + END)
    index = scan_tars(tmp_path, "train")
    (tmp_path / "train" / "b.tar").unlink()
    assert is_gone(index, 1, unreadable(index, 1))
    (tmp_path / "train" / "b.tar").write_bytes(member("b/x.png", PNG) + END)
    assert index.read(1, 10**6) == PNG


def loader(root: Path, said: list[str], interrupts: int = 0) -> Loader:
    config = compose_command("train", ["model.image_size=8"])
    transform = eval_transform(config.model.preprocessing)
    index = scan_split(root, "train", follow_links=False)
    dataset = ImageDataset(index, transform, 0, LIMITS, replacements=5)
    options = LoaderOptions(0, torch.device("cpu"))
    order = EvalOrder(np.arange(len(index)), 8)
    return Loader(dataset, order, options, [0.5] * 3, [0.5] * 3, Patience(lambda: interrupts, said.append))


def test_a_file_that_is_back_at_the_next_try_is_no_bad_image(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def read(path: str, max_bytes: int) -> bytes:
        tried.append(path)
        if len(tried) == 1:
            raise UnreadableError(path, OSError(errno.ENOENT, "No such file or directory"))
        return read_file(path, max_bytes)

    monkeypatch.setattr(indexing, "read_file", read)
    batches = list(loader(image_folder, []))
    assert [line for batch in batches for line in batch.bad] == []
    assert tried[0] == tried[1]


def test_a_data_set_that_stays_away_ends_a_wait(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "GIVEN_UP_AFTER_S", 1.0)
    said: list[str] = []
    batches = iter(loader(image_folder, said))
    image_folder.rename(image_folder.with_name("away"))
    with pytest.raises(DataLost, match=r"0\.png: can't be read .* was gone for 1 s"):
        next(batches)
    assert len(said) == 1
    image_folder.with_name("away").rename(image_folder)
    assert len(next(batches).images) == 8  # the same batch, for it was not lost


def test_an_interrupted_wait_can_go_on(image_folder: Path) -> None:
    asked = loader(image_folder, [], interrupts=10)
    batches = iter(asked)
    image_folder.rename(image_folder.with_name("away"))
    for _ in range(2):
        with pytest.raises(WaitInterrupted):
            next(batches)
    image_folder.with_name("away").rename(image_folder)
    asked.patience = Patience()
    assert sum(len(batch.images) for batch in batches) == 24


def test_a_long_wait_is_said_each_time_it_has_doubled(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = [0.0], []
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: now[0]))
    index, readers = scan_split(image_folder, "train", follow_links=False), Readers(3)
    wait = Wait(Patience(say=said.append), readers, index)
    readers.begin(1, 5)
    for second in range(250):
        now[0] = float(second)
        readers.begin(0, second % 4)  # it works
        wait.poll()
    assert said == [f"waiting for images since {after} s: {index.path(5)}" for after in (30, 60, 120, 240)]


def test_a_signal_at_any_moment_of_a_wait_leaves_it_its_limit() -> None:
    """In Python 3.11 a signal just at the limit lets some waits of the standard library last for ever."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    source = ThreadSource(iter(SlowBatches()), torch.device("cpu"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
        for _ in range(1500):
            assert source.take(0.001) is None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class SlowBatches:
    """Batches that do not come."""

    def __iter__(self) -> SlowBatches:
        return self

    def __next__(self) -> RawBatch:
        time.sleep(10)
        raise StopIteration
