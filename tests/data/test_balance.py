"""data.balance shows classes of few images more often: how often, in which order, and varied how."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from deepvit_train.config.data import Balance
from deepvit_train.data.balance import BalancedOrder, samples_a_class
from deepvit_train.data.order import Key, TrainOrder
from deepvit_train.distributed.world import World
from tests.conftest import QUICK, Command, as_ranks

SEED_OF_EPOCH = 8263108954855712153  # of seed 3: 8 bytes of BLAKE2b of ('order', 3, 0)
# 400 images of the first class, 100 of the third, 4 of the last, none of the second.
TARGETS = np.repeat([0, 2, 3], [400, 100, 4])


def keys(
    steps: range, balance: Balance, ranks: int = 1, repeats: int = 1, accumulate: int = 1
) -> list[list[Key]]:
    """The samples of each step, over all ranks and micro-batches."""
    by_rank = [
        list(
            TrainOrder(
                len(TARGETS),
                batch_size=72,
                accumulate=accumulate,
                steps_per_epoch=7,
                steps=steps,
                seed=3,
                repeats=repeats,
                balanced=None if balance == Balance.none else BalancedOrder(TARGETS, balance),
                world=World(rank, ranks, None),  # pyright: ignore[reportArgumentType] - no device is asked for
            )
        )
        for rank in range(ranks)
    ]
    return [
        [key for micro in range(accumulate) for rank in by_rank for key in rank[step * accumulate + micro]]
        for step in range(len(steps))
    ]


def test_samples_of_each_class() -> None:
    # 504 / 3; and 504 * 20 / 32, 504 * 10 / 32, 504 * 2 / 32.
    assert samples_a_class(TARGETS, Balance.uniform).tolist() == [168, 0, 168, 168]
    assert samples_a_class(TARGETS, Balance.sqrt).tolist() == [315, 0, 158, 31]
    assert samples_a_class(TARGETS, Balance.none).tolist() == [400, 0, 100, 4]
    assert samples_a_class(np.array([0, 0, 0, 1, 2]), Balance.uniform).tolist() == [2, 2, 1]


@pytest.mark.parametrize("balance", [Balance.sqrt, Balance.uniform])
def test_an_epoch_shows_the_images_of_a_class_equally_often(balance: Balance) -> None:
    samples = samples_a_class(TARGETS, balance)
    for epoch in range(3):
        order, before = BalancedOrder(TARGETS, balance).epoch(3, epoch)
        assert len(order) == len(TARGETS)
        assert np.bincount(TARGETS[order]).tolist() == samples.tolist()
        assert len(set(zip(order.tolist(), before.tolist(), strict=True))) == len(order)
        times = Counter(order.tolist())
        for label, count in ((0, 400), (2, 100), (3, 4)):
            shown = {times[image] for image in np.flatnonzero(label == TARGETS).tolist()}
            assert shown <= {samples[label] // count, samples[label] // count + 1}
        # The rare class is spread over the epoch, not in a row.
        places = np.flatnonzero(TARGETS[order] == 3)
        assert places[0] < 50
        assert places[-1] > 450


def test_every_image_of_a_large_class_comes_up_within_a_few_epochs() -> None:
    order = BalancedOrder(TARGETS, Balance.uniform)
    seen = {image for epoch in range(20) for image in order.epoch(0, epoch)[0].tolist()}
    assert seen == set(range(len(TARGETS)))


@pytest.mark.parametrize("balance", list(Balance))
@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_micro_batches_and_a_resume_change_nothing(balance: Balance, repeats: int) -> None:
    whole = keys(range(14), balance, repeats=repeats)
    assert keys(range(5, 14), balance, repeats=repeats) == whole[5:]
    split = keys(range(14), balance, ranks=2, repeats=repeats, accumulate=3)
    assert [sorted(step) for step in split] == [sorted(step) for step in whole]
    for epoch in (whole[:7], whole[7:]):  # no sample twice with the same draws
        every = [key for step in epoch for key in step]
        assert len(set(every)) == len(every) == 504
    assert whole[:7] != whole[7:]


def test_none_is_what_it_was() -> None:
    every = [key for step in keys(range(7), Balance.none) for key in step]
    assert every == [
        Key(0, image) for image in np.random.default_rng(SEED_OF_EPOCH).permutation(504).tolist()
    ]


@pytest.mark.runs
def test_a_balanced_run_is_the_same_after_a_resume_and_with_ranks(image_folder: Path, call: Command) -> None:
    for file in (image_folder / "train" / "cat").iterdir():
        if file.name not in ("0.png", "1.png"):
            file.unlink()
    learn = [
        *[each for each in QUICK if not each.startswith("trainer.batch_size")],
        "data=imagefolder",
        "augment=basic",
        f"data.root={image_folder}",
        "data.balance=uniform",
        "trainer.batch_size=4",
        "attn=self",
        "trainer.epochs=3",
    ]
    done = call("train", *learn, "run_dir=whole")
    assert not done.returncode, done.stderr
    assert "balance: uniform; ant has 8 images, each shown 0.75 x an epoch; cat has 2" in done.stdout
    for more in ("trainer.max_steps=6", "trainer.max_steps=null"):
        assert call("train", *learn, "run_dir=parts", more, "data.workers=2").returncode == 0
    whole, parts = (load_file(f"{run}/checkpoints/last/model.safetensors") for run in ("whole", "parts"))
    assert all(whole[name].equal(parts[name]) for name in whole)
    other = call("train", *learn, "run_dir=whole", "data.balance=none", "trainer.epochs=4")
    assert (other.returncode, "data.balance" in other.stderr) == (2, True)

    def on_two() -> None:
        call("train", *learn, "run_dir=two")

    assert as_ranks(2, on_two) == 0
    losses = [json.loads(Path(run, "result.json").read_text())["val/loss"] for run in ("whole", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert re.search("uniform", Path("two/config.yaml").read_text())
