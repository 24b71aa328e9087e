"""Run `deepvit-data demo|fashion-mnist`: it writes whole folders or none, and leaves others alone."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from deepvit_train.commands import data_folder
from deepvit_train.commands.data_folder import FITTING
from deepvit_train.config.compose import compose_command
from deepvit_train.data.index import scan_split
from deepvit_train.error import DataError, OutputError
from tests.conftest import Command


def test_the_demo_is_an_image_folder(call: Command, tmp_path: Path) -> None:
    done = call("data", "demo", "out=here/digits")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["images"] == {"train": 1433, "val": 364}
    for split, images in report["images"].items():
        index = scan_split(tmp_path / "here" / "digits", split, follow_links=False)
        assert (len(index), len(index.classes)) == (images, 10)
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("train on them: deepvit-train ")]
    printed, digits = shlex.split(line)[4:], compose_command("train", [])
    config = compose_command("train", printed)
    assert config.data.root == "here/digits"
    for section in ("model", "attn", "augment", "optim", "schedule", "trainer"):  # as on the embedded digits
        assert getattr(config, section) == getattr(digits, section)
    again = call("data", "demo", "out=here/digits")
    assert (again.returncode, again.stdout) == (6, "")
    assert "holds something already" in again.stderr


def test_nothing_is_left_of_a_folder_that_failed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = compose_command("data-fashion-mnist", [f"out={tmp_path}/out", f"source={tmp_path}/empty"])
    with pytest.raises(DataError, match="holds neither train-images-idx3-ubyte"):
        data_folder.run(config)
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


def test_a_place_that_takes_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        data_folder.run(compose_command("data-demo", [f"out={tmp_path}/file"]))


def test_what_is_typed_wrong_is_named(call: Command) -> None:
    for words, message in (
        (["data", "demmo"], "did you mean 'demo'?"),
        (["data", "demo"], "out is not given"),
        (["data", "demo", "ot=x"], "(deepvit-data demo --help lists all)"),
    ):
        done = call(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    told = call("data", "--help").stdout
    assert all(f"\n  {name} " in told for name in ("check", "demo", "fashion-mnist"))


@pytest.mark.parametrize("fitting", FITTING.values())
def test_small_grey_pictures_get_a_small_model_and_no_flip(fitting: str) -> None:
    config = compose_command("train", ["data=imagefolder", "data.root=/x", *fitting.split()])
    assert (config.data.name, config.model.dim, config.augment.flip) == ("imagefolder", 64, 0.0)
    assert config.model.image_size in (16, 28)
