"""`deepvit-train -m`: which runs it begins, and what one that fails does to the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepvit_train.cli import run_command
from deepvit_train.commands import sweep, train_build
from deepvit_train.config.train import TrainConfig
from deepvit_train.error import ConfigError, DataError, UserError
from tests.conftest import QUICK, as_ranks


@pytest.mark.parametrize("run_dir", ["runs/x", "runs/2025_11_26", "~/x", "runs/../runs/x"])
def test_runs_that_share_a_folder_are_refused_before_the_first(run_dir: str) -> None:
    def begin(config: TrainConfig) -> dict[str, Any]:
        raise AssertionError("a run was begun")

    with pytest.raises(ConfigError, match="3 of the 3 runs would be written to"):
        sweep.run([f"run_dir={run_dir}", "seed=1,2,3"], begin)


def test_a_folder_with_a_part_that_differs_is_taken() -> None:
    begun: list[str] = []

    def begin(config: TrainConfig) -> dict[str, Any]:
        begun.append(config.run_dir)
        return {}

    sweep.run(["run_dir=out/${name}", "seed=1,2"], begin)
    sweep.run(["run_dir=a,b"], begin)
    assert begun == ["out/digits-reattention-d6-s1", "out/digits-reattention-d6-s2", "a", "b"]


def test_a_failed_run_stops_no_other_and_gives_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def begin(config: TrainConfig) -> dict[str, Any]:
        if config.seed == 1:
            raise DataError("no such folder")
        return {"val/top1": 0.5}

    with pytest.raises(UserError, match=r"1 of 3 runs failed; the first is .*-s1: no such folder") as error:
        sweep.run(["seed=1,2,3"], begin)
    assert error.value.exit_code == DataError.exit_code
    assert capsys.readouterr().out.count("done") == 2


@pytest.mark.runs
@pytest.mark.xdist_group("ranks")
def test_a_run_that_fails_on_one_rank_ends_no_other_run(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the ranks it is, the others lose it, and all meet again in the next run."""
    monkeypatch.chdir(tmp_path)
    real: Callable[..., Any] = train_build.build_plan

    def plan(trainer: Any, *others: Any) -> Any:
        # The first run fails on rank 0, the second on rank 1.
        if int(os.environ["RANK"]) == trainer.accumulate - 1:
            raise DataError("this rank alone can't read it")
        return real(trainer, *others)

    three_runs = ["trainer.batch_size=36", "trainer.accumulate=1,2,3", "trainer.timeout_s=60"]

    def work() -> None:
        monkeypatch.setattr(train_build, "build_plan", plan)
        with pytest.raises(UserError, match=r"2 of 3 runs failed"):
            sweep.run([*QUICK, *three_runs], partial(run_command, "train"))

    assert as_ranks(2, work) == 0
    assert [folder.name for folder in Path("runs").iterdir() if (folder / "result.json").exists()] == [
        "digits-reattention-d2-s0-accumulate3"
    ]
