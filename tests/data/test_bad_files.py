"""Read bad files: each is named once and counted over ranks, and too many are an error."""

from __future__ import annotations

import pytest
import torch

from deepvit_train.data.bad_files import BadFiles, TooManyBadFiles
from deepvit_train.data.dataset import NONE_LEFT, NONE_NEAR, Batch
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def test_each_file_is_named_once() -> None:
    said: list[str] = []
    known = ["a: empty"]
    bad = BadFiles(known, max_bad=3, world=WORLD, say=said.append)
    batches = [
        Batch(torch.zeros(1), torch.zeros(1), lines) for lines in (["b: x", "a: empty"], [], ["c: y", "b: x"])
    ]
    assert list(bad.watch(batches)) == batches
    assert bad.settle() == 2
    assert bad.settle() == 0
    assert known == ["a: empty", "b: x", "c: y"]
    assert [line.rpartition("one: ")[2] for line in said] == ["b: x", "c: y"]
    bad.note(["d: z"])
    with pytest.raises(DataError, match=r"4 bad training images, more than data\.max_bad=3; the last: d: z"):
        bad.settle()
    assert known == ["a: empty", "b: x", "c: y"]
    assert bad.settle() == 0


def test_a_state_that_saw_a_black_image_is_not_to_be_saved() -> None:
    for marks, kind in (([], TooManyBadFiles), ([NONE_NEAR], DataError)):
        bad = BadFiles([], max_bad=1, world=WORLD, say=lambda _: None)
        bad.note(["a: x", "b: y", *marks])
        with pytest.raises(DataError, match="2 bad training images") as error:
            bad.settle()
        assert type(error.value) is kind


def test_a_data_set_of_bad_images_alone_ends_the_run_however_many_may_be_bad() -> None:
    said: list[str] = []
    bad = BadFiles([], max_bad=100, world=WORLD, say=said.append)
    bad.note(["a: x", "b: y", NONE_LEFT])
    with pytest.raises(DataError, match="every training image is bad; one of them: a: x"):
        bad.settle()
    assert bad.known == []
