"""Begin a run from its own folder, a named checkpoint, initial weights or nothing, in this order."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.config.train import TrainConfig
from deepvit_train.error import CheckpointError, DataError
from deepvit_train.run import saving
from deepvit_train.run.folder import RunFolder
from deepvit_train.training.origin import Origin, find_origin
from tests.conftest import QUICK


def checkpoint_in(run: Path) -> Path:
    (run / "checkpoints").mkdir(parents=True)
    files = {"model": saving.TensorFile({"a": torch.zeros(1)})}
    return saving.write_checkpoint(run / "checkpoints", 3, files, {})


def origin(folder: Path, *overrides: str) -> Origin:
    config = compose_command("train", [f"run_dir={folder}", *overrides])
    assert isinstance(config, TrainConfig)
    return find_origin(config, RunFolder(config.run_dir))


def test_the_first_that_there_is_decides(tmp_path: Path) -> None:
    run, other, weights = tmp_path / "run", tmp_path / "other", "model.weights=weights.safetensors"
    assert origin(run) == origin(run, "resume=never") == Origin()
    assert origin(run, weights) == Origin(weights="weights.safetensors")
    saved = checkpoint_in(other)
    assert origin(run, f"resume={other}") == Origin(checkpoint=saved)
    assert origin(run, f"resume={other}", weights) == Origin(checkpoint=saved)
    checkpoint_in(run)
    # What the run was begun from may be gone by now.
    shutil.rmtree(other)
    assert origin(run, f"resume={other}", weights) == Origin()


def test_a_weights_file_can_be_begun_with_but_not_resumed_from(tmp_path: Path) -> None:
    file = (checkpoint_in(tmp_path / "other") / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no training state; nearest: model\.weights="):
        origin(tmp_path / "run", f"resume={file}")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        origin(tmp_path / "run", f"resume={tmp_path / 'missing'}")


@pytest.fixture
def finished(image_folder: Path, tmp_path: Path) -> Path:
    start(tmp_path / "run", image_folder)
    return tmp_path / "run"


def start(folder: Path, images: Path, *overrides: str) -> None:
    data = ["data=imagefolder", f"data.root={images}", "model.image_size=16", "trainer.batch_size=8"]
    quick = [*QUICK, *data, f"run_dir={folder}", "trainer.ema_decay=0.9", *overrides]
    train.run(compose_command("train", quick))


@pytest.mark.parametrize("resumed", ["run", "second"])
def test_classes_of_other_names_are_not_trained_on(
    finished: Path, image_folder: Path, tmp_path: Path, resumed: str
) -> None:
    """As many of them as there were: nothing but their names tells that they mean something else."""
    for split in ("train", "val"):
        (image_folder / split / "ant").rename(image_folder / split / "dog")
    with pytest.raises(DataError, match=r"unknown to the model: dog; missing: ant"):
        start(tmp_path / resumed, image_folder, f"resume={finished}", "trainer.epochs=3")
