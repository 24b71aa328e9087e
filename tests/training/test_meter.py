"""Average over the steps of a log line."""

from __future__ import annotations

import pytest
import torch

from deepvit_train.distributed.world import World
from deepvit_train.training.meter import Meter

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def test_the_mean_loss_goes_on_where_the_run_stopped() -> None:
    before = Meter(ALONE)
    before.add(torch.tensor(1.0), images=8, waited_s=0.0)
    before.add(torch.tensor(2.0), images=8, waited_s=0.0)
    after = Meter(ALONE, *before.losses())
    after.add(torch.tensor(6.0), images=8, waited_s=0.0)
    line = after.take(learning_rate=0.1, grad_norm=torch.tensor(1.0))
    assert line["train/loss"] == 3.0
    assert after.losses() == ([0.0], 0, [])
    assert "train/cross_entropy" not in line  # no step had another one than its loss


def test_the_plain_loss_goes_on_too_or_begins_where_an_earlier_version_stopped() -> None:
    before = Meter(ALONE)
    before.add(torch.tensor(2.0), images=8, waited_s=0.0, plain_loss=torch.tensor(1.0))
    for losses, expected in ((before.losses(), 2.0), (before.losses()[:2], 3.0)):
        after = Meter(ALONE, *losses)
        after.add(torch.tensor(4.0), images=8, waited_s=0.0, plain_loss=torch.tensor(3.0))
        line = after.take(learning_rate=0.1, grad_norm=torch.tensor(1.0))
        assert (line["train/loss"], line["train/cross_entropy"]) == (3.0, expected)


def test_of_another_number_of_ranks_the_mean_goes_on() -> None:
    meter = Meter(ALONE, losses=[3.0, 5.0], steps=2)
    meter.add(torch.tensor(2.0), images=8, waited_s=0.0)
    assert meter.take(0.1, torch.tensor(1.0))["train/loss"] == pytest.approx((4.0 + 2.0) / 3)
