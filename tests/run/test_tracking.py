"""Write curves while the run's folder is taken away: nothing is written into another one of its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepvit_train.error import OutputError
from deepvit_train.run.tracking import Tracker


def test_curves_stay_in_the_folder_that_was_opened(tmp_path: Path) -> None:
    """TensorBoard by itself opens its file anew for each record."""
    run = tmp_path / "run"
    run.mkdir()
    tracker = Tracker(run, 0)
    tracker.scalars(1, {"train/loss": 2.0})
    run.rename(tmp_path / "moved")
    (run / "tb").mkdir(parents=True)
    tracker.scalars(2, {"train/loss": 1.0})
    tracker.close()
    assert [path.name for path in run.rglob("*")] == ["tb"]
    assert len((tmp_path / "moved" / "metrics.jsonl").read_text().splitlines()) == 2
    events = EventAccumulator(str(tmp_path / "moved" / "tb"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]


def test_a_folder_that_may_not_be_written_any_more_is_asked_for_first(tmp_path: Path) -> None:
    def gone() -> None:
        raise OutputError("gone")

    tracker = Tracker(tmp_path, 0, check=gone)
    with pytest.raises(OutputError, match="gone"):
        tracker.scalars(1, {"train/loss": 2.0})
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
