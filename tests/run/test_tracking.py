"""Write curves while the run's folder is taken away: nothing is written into another one of its name."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.config.train import TrackerName
from deepvit_train.error import ConfigError, OutputError
from deepvit_train.run.curves import LAYOUT, TensorBoard
from deepvit_train.run.elsewhere import check_installed
from deepvit_train.run.tracking import Tracker
from tests.conftest import QUICK

LOOK = """
import json, sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
(experiment,) = [each for each in client.search_experiments() if each.name == "deepvit-train"]
print(json.dumps([
    [run.data.tags["deepvit_run"], run.info.status,
     [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]]
    for run in client.search_runs([experiment.experiment_id])
]))
"""


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

    tracker = Tracker(tmp_path, 0)
    tracker._check = gone
    tracker.scalars(1, {"train/loss": 2.0})
    tracker.scalars(2, {"train/loss": 2.0})
    with pytest.raises(OutputError, match="gone"):
        tracker.raise_failure()
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    with pytest.raises(OutputError, match="gone"):
        Tracker(tmp_path, 0, check=gone)


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


def test_a_table_has_a_row_for_each_number_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, 0, others=[TrackerName.csv])
    tracker.scalars(1, {"train/loss": 0.1, "train/lr": 1e-05})
    tracker.scalars(2, {"train/loss": 0.25})
    tracker.scalars(2, {"val/top1": 0.5})
    tracker.scalars(3, {"train/loss": 7.0})
    tracker.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("2,train/lo")  # a kill cut this row short
    tracker = Tracker(tmp_path, 2, evaluated=False, others=[TrackerName.csv])
    tracker.scalars(3, {"train/loss": 0.125})
    tracker.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,name,value",
        "1,train/loss,0.1",
        "1,train/lr,1e-05",
        "2,train/loss,0.25",
        "3,train/loss,0.125",
    ]


def test_a_tracker_elsewhere_that_fails_is_left_out_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def scalars(self, step: int, values: dict[str, float]) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setattr(
        "deepvit_train.run.tracking.open_tracker",
        lambda *about: Broken(),
    )
    said: list[str] = []
    tracker = Tracker(tmp_path, 0, others=[TrackerName.mlflow], say=said.append)
    for step in (1, 2):
        tracker.scalars(step, {"train/loss": 0.1})
    tracker.close()
    tracker.raise_failure()
    assert said == ["warning: tracker=mlflow failed and is left out from now on: no route to host"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_whose_package_is_missing_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_installed([TrackerName.tensorboard, TrackerName.csv])
    with pytest.raises(ConfigError, match=r"tracker=wandb: .* pip install 'deepvit-train\[wandb\]'"):
        check_installed([TrackerName.wandb])


def test_one_tracker_needs_no_brackets_and_an_unknown_one_is_named() -> None:
    assert compose_command("train", ["tracker=csv"]).tracker == [TrackerName.csv]
    assert compose_command("train", ["tracker=[csv,wandb]"]).tracker == [TrackerName.csv, TrackerName.wandb]
    with pytest.raises(ConfigError, match="tracker"):
        compose_command("train", ["tracker=wanbd"])


def test_curves_that_can_not_be_written_cost_no_step(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = TensorBoard.scalars

    def fail(self: TensorBoard, step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, step, values)

    monkeypatch.setattr(TensorBoard, "scalars", fail)
    more = ["trainer.log_every_steps=1", "trainer.save_every_steps=null", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(OutputError, match=r"No space left on device\); saved .*step_0*4; the same command"):
        train.run(compose_command("train", [*QUICK, *more]))
    monkeypatch.undo()
    resumed = train.run(compose_command("train", [*QUICK, *more]))
    whole = train.run(compose_command("train", [*QUICK, *more[:-1], f"run_dir={tmp_path / 'whole'}"]))
    assert resumed["val/loss"] == whole["val/loss"]


def run_in_two_starts(tracker: str, folder: Path, environment: dict[str, str]) -> str:
    """Train a run in two starts. Returns the run's number."""
    more = [*("-m", "deepvit_train.cli", "train", *QUICK, f"tracker={tracker}", f"run_dir={folder / 'run'}")]
    for steps in ("trainer.max_steps=4", "trainer.max_steps=8"):
        done = subprocess.run(
            [sys.executable, *more, "trainer.log_every_steps=2", steps],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | environment,
        )
        assert done.returncode == 0, done.stderr
        assert "left out" not in done.stdout
    return json.loads((folder / "run" / "identity.json").read_text())["run"]


@pytest.mark.slow
def test_mlflow_shows_a_run_that_went_on_as_one(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    place, allowed = (tmp_path / "mlflow").as_uri(), {"MLFLOW_ALLOW_FILE_STORE": "true"}
    number = run_in_two_starts("mlflow", tmp_path, {"MLFLOW_TRACKING_URI": place, **allowed})
    looked = subprocess.run(
        [sys.executable, "-c", LOOK, place],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | allowed,
        check=True,
    )
    assert json.loads(looked.stdout) == [[number, "FINISHED", [2, 4, 6, 8]]]


@pytest.mark.runs
def test_wandb_shows_a_run_that_went_on_as_one(digits: Path, tmp_path: Path) -> None:
    """It writes to local files here, without a network."""
    pytest.importorskip("wandb")
    number = run_in_two_starts("wandb", tmp_path, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    folders = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert {name.rpartition("-")[2] for name in folders} == {number}


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
