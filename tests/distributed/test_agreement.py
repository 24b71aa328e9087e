"""Show that what one rank finds wrong ends all of them, and that a difference is named."""

from __future__ import annotations

import pytest

from deepvit_train.distributed import world as distributed
from deepvit_train.distributed.agreement import differing, together, told
from deepvit_train.error import ConfigError, DataError, OutputError
from tests.conftest import as_ranks

pytestmark = pytest.mark.xdist_group("ranks")


def test_one_process_agrees_with_itself() -> None:
    world = distributed.start("cpu", timeout_s=60)
    assert together(world, lambda: 3) == 3
    assert differing(world, {"a": object()}) == {}
    with pytest.raises(DataError, match=r"^no such folder$"):
        together(world, lambda: _fail(DataError("no such folder")))


def _fail(error: Exception) -> None:
    raise error


def test_an_error_of_one_rank_is_that_of_all() -> None:
    def work() -> None:
        world = distributed.start("cpu", timeout_s=60)
        assert together(world, lambda: world.rank) == world.rank
        with pytest.raises(DataError, match=r"^rank 1: no such folder$"):
            together(world, lambda: _fail(DataError("no such folder")) if world.rank == 1 else None)
        with pytest.raises(ConfigError, match=r"^seed=x$"):  # of all ranks alike, so no rank is named
            together(world, lambda: _fail(ConfigError("seed=x")))
        own = [None, OutputError("full"), DataError("gone")][world.rank]
        with pytest.raises(OutputError, match=r"^rank 1: full$"):  # the lowest one decides for all
            together(world, lambda: _fail(own) if own else None)
        distributed.stop()

    assert as_ranks(3, work) == 0


def test_what_differs_is_named_with_its_rank() -> None:
    def work() -> None:
        world = distributed.start("cpu", timeout_s=60)
        same = {"optim.lr": 0.1, "classes": ["é", "b"]}
        assert differing(world, same) == {}
        odd = differing(world, same | {"seed": world.rank // 2, "rank": 5})
        assert odd == {"seed": [0, 0, 1]}
        assert told("seed", odd["seed"]) == "seed=0 on rank 0, seed=1 on rank 2"
        assert differing(world, {"only": 1} if world.rank else {}) == {"only": [None, 1, 1]}
        distributed.stop()

    assert as_ranks(3, work) == 0
