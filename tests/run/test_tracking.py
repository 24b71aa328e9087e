"""Write curves while the run's folder is taken away: nothing is written into another one of its name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.error import OutputError
from deepvit_train.run.tracking import LAYOUT, Tracker
from tests.conftest import QUICK


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


def test_the_page_begins_with_loss_accuracy_rate_and_speed_and_the_keys_that_tell_runs_apart(
    tmp_path: Path,
) -> None:
    tracker = Tracker(tmp_path, 0)
    tracker.scalars(1, {"val/top1": 0.5})
    config = {"attn.kind": "self", "model.dim": 16, "optim.lr": 1e-3}
    tracker.outcome(config, {"optim.lr", "attn.kind"}, {"val/top1": 0.5}, 1)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    training, collapse = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0]).category
    assert [chart.title for chart in training.chart][:4] == [
        "loss",
        "top-1",
        "learning rate",
        "images a second",
    ]
    assert collapse.title == "collapse"
    said = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    ).experiment
    assert {info.name: info.differs for info in said.hparam_infos} == {
        "attn.kind": True,
        "model.dim": False,
        "optim.lr": True,
    }
    assert [info.name.tag for info in said.metric_infos] == ["final/val/top1"]
    (text,) = events.Tensors("about the curves/text_summary")
    assert b"train/cross_entropy" in text.tensor_proto.string_val[0]
    assert [event.value for event in events.Scalars("final/val/top1")] == [0.5]


@pytest.mark.runs
def test_every_curve_of_a_run_has_a_chart(digits: Path, tmp_path: Path) -> None:
    """A curve that is renamed, or a new one, is missed here."""
    charts = [tag for category in LAYOUT.values() for _, tags in category.values() for tag in tags]
    more = ["loss.label_smoothing=0.1", "trainer.ema_decay=0.9", "trainer.probe_every_steps=6"]
    train.run(compose_command("train", [*QUICK, *more, "attn=reattention", f"run_dir={tmp_path / 'run'}"]))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"step", "val/images", "val/of"}
    assert "train/cross_entropy" in logged
    assert not [name for name in logged if not any(re.search(chart, name) for chart in charts)]
