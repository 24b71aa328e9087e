"""A limited evaluation takes its images evenly over the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deepvit_train.config.compose import compose_command
from deepvit_train.data.choice import spread_over_classes
from deepvit_train.data.index import scan_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed.world import World

UNEVEN = np.repeat(np.arange(5), [40, 3, 0, 17, 100])


@pytest.mark.parametrize("count", [1, 4, 10, 50, 160])
def test_each_class_gives_as_many_as_any_other_or_all_it_has(count: int) -> None:
    chosen = spread_over_classes(UNEVEN, count)
    assert len(set(chosen.tolist())) == count
    assert chosen.tolist() == sorted(chosen.tolist())
    taken, there = np.bincount(UNEVEN[chosen], minlength=5), np.bincount(UNEVEN)
    most = taken.max()
    assert all(of == take or take in (most, most - 1) for take, of in zip(taken, there, strict=True))


def test_the_choice_is_always_the_same_and_grows() -> None:
    smaller, larger = spread_over_classes(UNEVEN, 10), spread_over_classes(UNEVEN, 50)
    assert np.array_equal(spread_over_classes(UNEVEN, 10), smaller)
    assert set(smaller) < set(larger)


def test_fewer_images_than_classes_are_not_those_of_the_first_classes() -> None:
    classes = np.repeat(np.arange(1000), 50)[spread_over_classes(np.repeat(np.arange(1000), 50), 256)]
    assert len(set(classes.tolist())) == 256
    assert 400 < classes.mean() < 600


def test_a_limit_holds_for_each_rank_and_all_ranks_together_spread(image_folder: Path) -> None:
    config = compose_command("train", [])
    index = scan_split(image_folder, "val", False)  # 3 images in each of 3 classes
    worlds = [World(rank, 2, torch.device("cpu")) for rank in range(2)]
    loaders = [Loaders(config.model.preprocessing, config.data, world) for world in worlds]
    targets = [
        [batch.targets.tolist() for batch in each.evaluation(index, batch_size=1, limit_batches=3)]
        for each in loaders
    ]
    assert [len(batches) for batches in targets] == [3, 3]
    seen = [target for batches in targets for batch in batches for target in batch]
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    everything = loaders[0].evaluation(index, batch_size=4, limit_batches=2)
    assert len(everything) == 2  # 16 images may be taken and there are 9: no limit at all
