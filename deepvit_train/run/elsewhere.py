"""Trackers besides TensorBoard: a table for spreadsheets, and three programs that show runs side by side.

Each program is told where to write by its own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_SPACE_ID, ...). A run that goes on is shown as one run, because it is known by its number. What was
logged after the step that it goes on from is there twice, because these programs take nothing back.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from deepvit_train.atomic import append, write_text
from deepvit_train.config.train import TrackerName
from deepvit_train.error import ConfigError
from deepvit_train.reading import read_bytes

PROJECT = "deepvit-train"  # the folder of runs that a program shows them in, unless its variables say another
PACKAGES = {TrackerName.trackio: "trackio", TrackerName.wandb: "wandb", TrackerName.mlflow: "mlflow"}


class Elsewhere(Protocol):
    """A tracker that gets what TensorBoard gets, but for texts."""

    def configuration(self, config: dict[str, Any]) -> None:
        """Take the run's configuration, with dotted keys."""
        ...

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point to each curve."""
        ...

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Take an image (3, height, width) with values in 0..1."""
        ...

    def close(self) -> None:
        """Write or send what is still held back."""
        ...


def check_installed(names: Sequence[TrackerName]) -> None:
    """Raise ConfigError for a tracker whose package is missing."""
    for name in names:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"tracker={name}: the package {PACKAGES[name]} is not installed; "
                f"pip install 'deepvit-train[{name}]'"
            )


def open_tracker(name: TrackerName, folder: Path, run: str, kept: int, evaluated: bool) -> Elsewhere:
    """Open a tracker for a run.

    Args:
        folder: the run's folder. Its name is the run's name.
        run: the run's number, by which the tracker knows it again.
        kept: the last step of what was logged before that stays.
        evaluated: whether the evaluation of that step stays too.
    """
    if name == TrackerName.csv:
        return Table(folder / "metrics.csv", kept, evaluated)
    return {TrackerName.trackio: Trackio, TrackerName.wandb: Wandb, TrackerName.mlflow: MLflow}[name](
        folder, run
    )


class Table:
    """RUN/metrics.csv: a row of step, name and value for each number."""

    def __init__(self, file: Path, kept: int, evaluated: bool) -> None:
        rows = [["step", "name", "value"]]
        if file.exists():
            whole = read_bytes(file).decode(errors="replace").rpartition("\n")[0]  # a kill cuts a row short
            for row in list(csv.reader(whole.splitlines()))[1:]:
                if len(row) == 3 and row[0].isdecimal() and int(row[0]) <= kept:
                    doomed = not evaluated and int(row[0]) == kept and row[1].startswith("val")
                    rows += [row] * (not doomed)
        write_text(file, "".join(f"{','.join(row)}\n" for row in rows))
        self._file = append(file)

    def configuration(self, config: dict[str, Any]) -> None:
        """Leave it out: RUN/config.yaml has it."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write a row for each value."""
        self._file.write("".join(f"{step},{name},{value!r}\n" for name, value in values.items()))

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Leave it out: a table holds no images."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Wandb:
    """Weights & Biases. WANDB_MODE=offline writes to RUN/wandb alone."""

    def __init__(self, folder: Path, run: str) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        self._run = self._wandb.init(
            project=self._wandb.Settings().project or PROJECT,
            name=folder.name,
            id=run,
            resume="allow",
            dir=str(folder),
        )
        # A point may come at a step before the last one when a run goes on: only so is it kept.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def configuration(self, config: dict[str, Any]) -> None:
        """Send the configuration."""
        self._run.config.update(config, allow_val_change=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Send a point of each curve."""
        self._run.log({**values, "step": step})

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Send an image."""
        self._run.log({name: self._wandb.Image(to_pil_image(image)), "step": step})

    def close(self) -> None:
        """Send what is still held back."""
        self._run.finish()


class Trackio:
    """Trackio. It writes to its own folder in the user's cache unless TRACKIO_SPACE_ID names a server."""

    def __init__(self, folder: Path, run: str) -> None:
        self._trackio: Any = importlib.import_module("trackio")
        # Trackio knows a run again by its name alone.
        self._run = self._trackio.init(
            project=PROJECT, name=f"{folder.name}-{run[:6]}", resume="allow", embed=False
        )

    def configuration(self, config: dict[str, Any]) -> None:
        """Send the configuration."""
        self._run.config.update(config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Send a point of each curve."""
        self._trackio.log(values, step=step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Send an image."""
        self._trackio.log({name: self._trackio.Image(to_pil_image(image))}, step=step)

    def close(self) -> None:
        """Send what is still held back."""
        self._trackio.finish()


class MLflow:
    """MLflow, wherever MLFLOW_TRACKING_URI says, in the experiment of MLFLOW_EXPERIMENT_NAME."""

    def __init__(self, folder: Path, run: str) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(
            mlflow.environment_variables.MLFLOW_EXPERIMENT_NAME.get() or PROJECT
        )
        known = self._client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.deepvit_run = '{run}'", max_results=1
        )
        self._id = (
            known[0].info.run_id
            if known
            else self._client.create_run(
                experiment.experiment_id, tags={"deepvit_run": run}, run_name=folder.name
            ).info.run_id
        )
        self._client.update_run(self._id, status="RUNNING")

    def configuration(self, config: dict[str, Any]) -> None:
        """Log the configuration as a file, because MLflow's parameters may not change when a run goes on."""
        self._client.log_dict(self._id, config, "config.json")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log a point of each curve."""
        now = int(time.time() * 1000)
        points = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=points)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Log an image."""
        self._client.log_image(self._id, to_pil_image(image), key=name.replace("/", "."), step=step)

    def close(self) -> None:
        """Say that the run ended."""
        self._client.set_terminated(self._id)
