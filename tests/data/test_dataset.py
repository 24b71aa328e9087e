"""Show that samples and their order depend on (seed, epoch, image) alone, whoever loads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepvit_train.config.compose import compose_command
from deepvit_train.data.dataset import NONE_LEFT, NONE_NEAR, ImageDataset
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import scan_split
from deepvit_train.data.order import EvalOrder, Key, TrainOrder
from deepvit_train.data.transform import eval_transform, train_transform
from deepvit_train.determinism import derive_seed, permutation, seeded
from deepvit_train.distributed.world import World

CPU = torch.device("cpu")
LIMITS = Limits(max_bytes=10**7, max_pixels=10**7)


def order(steps: range, **options: Any) -> list[list[Key]]:
    defaults = {"batch_size": 8, "accumulate": 1, "steps_per_epoch": 3, "seed": 5}
    return list(TrainOrder(26, steps=steps, **{**defaults, **options}))


def test_an_epoch_takes_each_image_at_most_once_and_epochs_differ() -> None:
    batches = order(range(6))
    first, second = (
        sorted(key.image for batch in part for key in batch) for part in (batches[:3], batches[3:])
    )
    assert len(set(first)) == len(set(second)) == 24
    assert [key.image for key in batches[0]] != [key.image for key in batches[3]]
    assert {key.epoch for batch in batches[3:] for key in batch} == {1}


@pytest.mark.parametrize("repeats", [1, 3])
def test_order_does_not_depend_on_ranks_micro_batches_or_where_it_begins(repeats: int) -> None:
    whole = order(range(6), repeats=repeats)
    assert order(range(4, 6), repeats=repeats) == whole[4:]
    by_rank = [order(range(6), accumulate=2, world=World(rank, 2, CPU), repeats=repeats) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [by_rank[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert [key for part in parts for key in part] == batch


@pytest.mark.parametrize(("accumulate", "ranks"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)])
def test_pairs_of_a_batch_stay_together_in_its_micro_batches(accumulate: int, ranks: int) -> None:
    whole = order(range(3))
    micro = [
        order(range(3), accumulate=accumulate, world=World(rank, ranks, CPU), mirrored=True)
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        parts = [dealt for each in micro for dealt in each[step * accumulate : (step + 1) * accumulate]]
        pairs = {frozenset(pair) for part in parts for pair in zip(part, reversed(part), strict=True)}
        assert pairs == {frozenset(pair) for pair in zip(batch, reversed(batch), strict=True)}
        assert sorted(key for part in parts for key in part) == sorted(batch)
    if accumulate * ranks == 1:
        assert micro[0] == whole


def test_a_repeated_image_follows_itself_and_an_epoch_keeps_its_length() -> None:
    keys = [key for batch in order(range(3), repeats=3) for key in batch]
    assert len(set(keys)) == len(keys) == 24
    assert len({key.image for key in keys}) == 8
    assert [key.image for key in keys[:3]] == [keys[0].image] * 3
    assert [key.repeat for key in keys] == [0, 1, 2] * 8


def test_evaluation_counts_each_image_once_over_any_number_of_ranks() -> None:
    for images, world_size in ((1, 2), (7, 2), (10, 3), (64, 4)):
        dealt = [EvalOrder(np.arange(images), 4, World(rank, world_size, CPU)) for rank in range(world_size)]
        batches = [list(ranks) for ranks in dealt]
        assert [len(ranks) for ranks in dealt] == [len(ranks) for ranks in batches]
        assert sorted(key.image for ranks in batches for batch in ranks for key in batch) == list(
            range(images)
        )


@pytest.fixture
def dataset(digits: Path) -> ImageDataset:
    config = compose_command("train", ["augment=deit"])
    transform = train_transform(config.model.preprocessing, config.augment)
    return ImageDataset(scan_split(digits, "train", False), transform, 3, LIMITS, replacements=100)


def test_a_sample_depends_on_seed_epoch_image_and_repeat_alone(dataset: ImageDataset) -> None:
    first = dataset.__getitems__([Key(0, 7)])
    torch.rand(5)
    random.random()
    together = dataset.__getitems__([Key(0, 3), Key(0, 7)])
    assert torch.equal(together.pixels[1], first.pixels[0])
    assert np.array_equal(together.erase[1], first.erase[0])
    other = ImageDataset(dataset.index, dataset.transform, 4, LIMITS, replacements=100)
    for changed in (dataset.__getitems__([Key(1, 7)]), dataset.__getitems__([Key(0, 7, 1)])):
        assert not torch.equal(changed.pixels, first.pixels)
    assert not torch.equal(other.__getitems__([Key(0, 7)]).pixels, first.pixels)


def test_loading_leaves_the_generators_as_they_were(dataset: ImageDataset) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    dataset.__getitems__([Key(0, 1), Key(0, 2)])
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_seeds_differ_by_purpose_and_number() -> None:
    seeds = {derive_seed(purpose, *numbers) for purpose in "ab" for numbers in ((1, 2), (12,), (2, 1))}
    assert len(seeds) == 6
    assert sorted(permutation(9, seed=1)) == list(range(9))


def test_generators_are_put_back_after_an_error() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_a_bad_image_is_named_and_replaced_by_the_next(image_folder: Path) -> None:
    index = scan_split(image_folder, "train", False)
    broken = Path(index.path(3))
    broken.write_bytes(broken.read_bytes()[:100])
    Path(index.path(4)).write_bytes(b"")
    transform = eval_transform(compose_command("train", []).model.preprocessing)
    dataset = ImageDataset(index, transform, 0, LIMITS, replacements=2)
    batch = dataset.__getitems__([Key(0, 3), Key(0, 5)])
    assert torch.equal(batch.pixels[0], batch.pixels[1])
    assert [line.split(":")[0] for line in batch.bad] == [index.path(3), index.path(4)]


@pytest.mark.parametrize("replacements", [0, 1, 10**9])
def test_replacing_has_an_end(image_folder: Path, replacements: int) -> None:
    index = scan_split(image_folder, "val", False)
    for image in range(len(index)):
        Path(index.path(image)).write_bytes(b"")
    transform = eval_transform(compose_command("train", []).model.preprocessing)
    batch = ImageDataset(index, transform, 0, LIMITS, replacements).__getitems__([Key(0, 3)])
    marks = {0: [], 1: [NONE_NEAR], 10**9: [NONE_LEFT]}[replacements]
    assert len(batch.bad) == min(replacements + 1, len(index)) + len(marks)
    assert batch.bad[len(batch.bad) - len(marks) :] == marks
    assert not batch.pixels.any()
    assert batch.targets.tolist() == [1]
