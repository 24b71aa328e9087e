"""Copy runs with their links followed, and let results go stale: each is taken as what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deepvit_train.error import DataError
from deepvit_train.training import validation
from tests.conftest import Command
from tests.fault.conftest import RUN, STEPS

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("identity")]


@pytest.mark.slow
def test_a_copy_that_followed_links_goes_on_however_often_it_is_copied(runs: Path, call: Command) -> None:
    source = runs / "a"
    for copied, epochs in enumerate((3, 4, 5)):
        target = runs / f"copy{copied}"
        shutil.copytree(source, target)
        assert (target / "checkpoints" / "best").is_dir()
        assert not (target / "checkpoints" / "best").is_symlink()
        for command in ("eval", "analyze"):
            done = call(command, f"checkpoint=copy{copied}", "threads=1", "data.workers=0")
            assert done.returncode == 0, done.stderr
        done = call("train", *RUN, f"run_dir=copy{copied}", f"trainer.epochs={epochs}")
        assert done.returncode == 0, done.stderr
        assert f"at step {6 * (epochs - 1)} of {6 * epochs}" in done.stdout
        entries = [entry for entry in (target / "checkpoints").iterdir() if entry.is_dir()]
        assert all(entry.is_symlink() == (entry.name in ("last", "best")) for entry in entries)
        assert not any("copied" in entry.name for entry in entries)
        source = target


def test_of_a_copy_only_links_may_be_left(runs: Path, call: Command) -> None:
    shutil.copytree(runs / "a", runs / "b")
    for name in STEPS:
        shutil.rmtree(runs / "b" / "checkpoints" / name)
    done = call("train", *RUN, "run_dir=b", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    assert "at step 12 of 18" in done.stdout


def test_a_damaged_copy_is_kept_and_a_whole_one_takes_the_place_of_a_damaged_checkpoint(
    runs: Path, call: Command
) -> None:
    shutil.copytree(runs / "a", runs / "b")
    (runs / "b" / "checkpoints" / "last" / "ema.safetensors").write_bytes(b"")
    (runs / "b" / "checkpoints" / "last-copied").mkdir()
    best = json.loads((runs / "b" / "checkpoints" / "best" / "state.json").read_text())["step"]
    (runs / "b" / "checkpoints" / f"step_{best:07d}" / "model.safetensors").write_bytes(b"")
    done = call("train", *RUN, "run_dir=b", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    assert (runs / "b" / "checkpoints" / "last-copied-2" / "ema.safetensors").read_bytes() == b""
    assert (runs / "b" / "checkpoints" / f"step_{best:07d}" / "model.safetensors").stat().st_size > 1000


def test_results_of_what_is_no_more_do_not_stay(runs: Path, call: Command) -> None:
    checkpoints = runs / "a" / "checkpoints"
    for name in STEPS:
        done = call("eval", f"checkpoint=a/checkpoints/{name}", "threads=1", "data.workers=0", "report=false")
        assert done.returncode == 0, done.stderr
    assert len(list(checkpoints.glob("step_*.json"))) == 4
    done = call("train", *RUN, "run_dir=a", "trainer.epochs=3", "trainer.keep_last=1")
    assert done.returncode == 0, done.stderr
    left = {path.name for path in checkpoints.iterdir() if path.is_dir()} - {"last", "best"}
    assert {path.name.partition(".")[0] for path in checkpoints.glob("step_*.json")} <= left
    assert "step_0000003" not in left


def test_the_result_of_a_run_that_goes_on_is_removed(
    runs: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("train", *RUN, "run_dir=a").returncode == 0
    assert (runs / "a" / "result.json").exists()  # finished already

    def fail(*_: object) -> None:
        raise DataError("x.png: broken")

    monkeypatch.setattr(validation, "evaluate", fail)
    assert call("train", *RUN, "run_dir=a", "trainer.epochs=3").returncode == 4
    assert not (runs / "a" / "result.json").exists()
