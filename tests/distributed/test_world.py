"""Show which device a process gets, and what ranks tell each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deepvit_train.data.dataset import Batch
from deepvit_train.data.patience import DataLost, WaitInterrupted
from deepvit_train.distributed import world as distributed
from deepvit_train.error import ConfigError, UserError
from deepvit_train.training.interruption import EvaluationStopped, StopSignals, receive
from tests.conftest import as_ranks


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device=cuda: torch finds no CUDA GPU here; nearest: device=cpu"):
        distributed.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="2 here; nearest: 2"):
        distributed.choose_device("cuda")


@pytest.mark.xdist_group("ranks")
def test_ranks_learn_what_the_others_say() -> None:
    def work() -> None:
        world = distributed.start("cpu", timeout_s=60)
        assert world.first(f"rank {world.rank}") == "rank 0"
        assert world.each(world.rank + 0.5) == [0.5, 1.5, 2.5]
        assert world.largest(world.rank, -world.rank) == [2, 0]
        assert world.union({f"{world.rank}"}) == {"0", "1", "2"}
        distributed.stop()

    assert as_ranks(3, work) == 0


@pytest.mark.xdist_group("ranks")
def test_a_stop_ends_an_evaluation_on_all_ranks_at_the_same_batch() -> None:
    """Whichever of them it reaches, and though they have one batch more and fewer."""

    def work() -> None:
        world, signals = distributed.start("cpu", timeout_s=60), StopSignals()
        batches = [Batch(torch.zeros(1), torch.zeros(1), [])] * (5 + world.rank)
        assert len(list(signals.watch(batches, world))) == 5 + world.rank
        watched = iter(signals.watch(batches, world))
        for _ in range(3):
            next(watched)
        signals.stop = 15 * world.rank
        with pytest.raises(EvaluationStopped):
            next(watched)
        distributed.stop()

    assert as_ranks(2, work) == 0


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("failure", [WaitInterrupted("interrupted", 15), DataLost("gone")])
def test_a_rank_that_waits_in_vain_ends_the_wait_of_all(failure: UserError) -> None:
    """In training all save once, and in an evaluation nobody waits for the one that gave up."""

    def work() -> None:
        world, signals = distributed.start("cpu", timeout_s=60), StopSignals()
        batch, saved = Batch(torch.zeros(1), torch.zeros(1), []), []

        def batches() -> Iterator[Batch]:
            yield from [batch] * 3
            if world.rank == 1:
                signals.stop = 15 if isinstance(failure, WaitInterrupted) else 0
                raise failure
            yield from [batch] * 3

        source = batches()
        assert receive(source, 2, signals, world, lambda: saved.append(1)) == [batch] * 2
        assert not saved
        with pytest.raises(type(failure)) as error:
            receive(source, 2, signals, world, lambda: saved.append(1))
        assert saved == [1]
        assert (error.value is failure) == (world.rank == 1)

        signals.stop = 0
        seen = []
        ends = EvaluationStopped if isinstance(failure, WaitInterrupted) else DataLost
        with pytest.raises(ends):
            seen.extend(signals.watch(batches(), world))
        distributed.stop()

    assert as_ranks(2, work) == 0
