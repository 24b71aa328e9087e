"""Show that blocks of loader processes are reused once nothing reads them, and not before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepvit_train.config.compose import compose_command
from deepvit_train.data.dataset import ImageDataset
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import scan_split
from deepvit_train.data.loader import BLOCKS_A_WORKER, Loader, LoaderOptions
from deepvit_train.data.order import EvalOrder
from deepvit_train.data.shared import SharedBlocks
from deepvit_train.data.transform import eval_transform
from tests.conftest import forked

SHAPE = (2, 3, 4, 4)


def test_a_block_is_free_when_nobody_reads_it() -> None:
    blocks = SharedBlocks(workers=2, blocks=2, size=96)

    def fill() -> None:
        for value in (1, 2):
            block = blocks.take(1, SHAPE)
            assert block is not None
            block.pixels.fill_(value)
        assert blocks.take(1, SHAPE) is None
        assert blocks.take(0, (3, *SHAPE)) is None  # too large

    assert forked(fill) == 0
    read = [blocks.receive(1, number, SHAPE) for number in (0, 1)]
    assert [each.unique().tolist() for each in read] == [[1], [2]]
    part = read.pop(0).numpy()[1:]
    assert blocks.take(1, SHAPE) is None
    del read
    assert blocks.take(1, SHAPE) is not None  # that of the second
    assert blocks.take(1, SHAPE) is None
    assert part.max() == 1
    del part
    assert blocks.take(1, SHAPE) is not None
    assert blocks.take(0, SHAPE) is not None


@pytest.fixture
def loader(digits: Path) -> Loader:
    preprocessing = compose_command("train", []).model.preprocessing
    index = scan_split(digits, "train", follow_links=False)
    dataset = ImageDataset(index, eval_transform(preprocessing), 0, Limits(10**7, 10**7), replacements=0)
    order = EvalOrder(np.arange(200), batch_size=16)
    return Loader(dataset, order, LoaderOptions(2, torch.device("cpu")), [0.5] * 3, [0.5] * 3)


def test_a_loader_goes_round_its_blocks_and_gives_them_back(
    loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fresh shared memory, asked for in a loader process, would end the run.
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", None)
    assert loader.shared is not None
    size = 16 * 3 * 16 * 16
    blocks = [
        loader.shared.view(worker, block, (size,)) for worker in (0, 1) for block in range(BLOCKS_A_WORKER)
    ]
    for _ in range(2):
        assert len(list(loader)) == 13
        assert not any(block.any() for block in blocks)
        sums = [raw.pixels.sum().item() for raw in loader.raw]
        assert len(set(sums)) == 13
        assert any(block.any() for block in blocks)


def test_batches_that_are_kept_stay_as_they_are(loader: Loader) -> None:
    passing = [raw.pixels.sum().item() for raw in loader.raw]
    kept = [raw.pixels for raw in loader.raw]  # more than there are blocks
    assert [pixels.sum().item() for pixels in kept] == passing
    again = iter(loader.raw)
    next(again)  # and broken off
    assert [raw.pixels.sum().item() for raw in loader.raw] == passing
    assert [pixels.sum().item() for pixels in kept] == passing
