"""What a data set of one's own brings along when nothing else is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepvit_train.config.compose import compose_command, plain
from deepvit_train.config.photographs import holds_tars, implied_choices
from tests.conftest import QUICK, Command

PHOTOGRAPHS = "experiment=photographs"


@pytest.mark.parametrize(
    ("typed", "implied"),
    [
        ([], []),
        (["data=digits", "data.root=/x"], []),
        (["data.root=null"], []),
        (["data.root=/x"], ["data=imagefolder", PHOTOGRAPHS]),
        (["data.root='/x y'"], ["data=imagefolder", PHOTOGRAPHS]),
        (["data.root=/x", "model=vit_small"], ["data=imagefolder", PHOTOGRAPHS]),
        (["data=imagefolder", "data.root=/x", "model=digits"], []),
        (["data.root=/x", "experiment=null"], []),
        (["data.root=/x", "experiment=deepvit_s"], []),
        (["data=imagefolder", "data.root=/x"], [PHOTOGRAPHS]),
        (["data=tar", "data.root=/x"], [PHOTOGRAPHS]),
        (["data=tar", "data.root=/x", "model=deepvit_s"], []),
        (["data=imagefolder", "data.root=/x", "experiment=vit_16b"], []),
        (["data.name=imagefolder", "data.root=/x"], []),
    ],
)
def test_a_data_set_brings_what_the_command_line_leaves_open(typed: list[str], implied: list[str]) -> None:
    assert implied_choices("train", typed) == implied


@pytest.mark.parametrize("file", ["train.tar", "train/0.tar", "train-000.tar", "flowers-train-000.tar"])
def test_tar_files_are_found_where_there_are_no_class_folders(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    assert holds_tars(tmp_path)
    assert implied_choices("train", [f"data.root={tmp_path}"]) == ["data=tar", PHOTOGRAPHS]
    assert implied_choices("train", [f"data.root={tmp_path}", "experiment=deepvit_s"]) == ["data=tar"]
    assert implied_choices("data-check", [f"root={tmp_path}"]) == ["data=tar"]
    (tmp_path / "train" / "ant").mkdir(parents=True)
    assert not holds_tars(tmp_path)


def test_photographs_get_a_model_for_224_pixels() -> None:
    alone = compose_command("train", ["data.root=/x"])
    assert (alone.data.name, alone.model.image_size, alone.attn.kind) == ("imagefolder", 224, "reattention")
    assert (alone.model.depth, alone.augment.flip, alone.trainer.batch_size) == (12, 0.5, 128)
    typed = compose_command("train", ["data.root=/x", "trainer.batch_size=64", "attn=self"])
    assert (typed.trainer.batch_size, typed.attn.kind) == (64, "self")
    assert compose_command("train", []).model.image_size == 16


def test_another_model_keeps_the_recipe_of_photographs() -> None:
    short = compose_command("train", ["data.root=/x", "model=vit_small"])
    assert (short.model.heads, short.attn.kind, short.model.drop_path) == (6, "self", 0.0)
    assert (short.trainer.batch_size, short.optim.lr) == (128, 2.5e-4)
    assert short == compose_command("train", ["experiment=photographs", "data.root=/x", "model=vit_small"])


def test_data_and_model_that_are_typed_bring_nothing() -> None:
    """These command lines give what they gave before photographs had a model of their own."""
    config = compose_command("train", ["data=imagefolder", "data.root=/x", "model=digits"])
    digits = compose_command("train", ["augment=basic"])
    for section in ("model", "attn", "augment", "optim", "schedule", "trainer"):
        assert plain(getattr(config, section)) == plain(getattr(digits, section))


@pytest.mark.parametrize("more", [[], ["model=vit_small"], ["model=digits", "augment=none"], ["attn=self"]])
def test_data_check_times_what_would_be_trained(more: list[str]) -> None:
    checked = compose_command("data-check", ["/x", *more])
    trained = compose_command("train", ["data.root=/x", *more])
    for section in ("model", "attn", "augment", "data"):
        assert getattr(checked, section) == getattr(trained, section)


def test_what_was_chosen_is_told_by_cfg_and_help(call: Command) -> None:
    told = call("train", "data.root=/x", "--cfg").stdout
    assert told.startswith("# chosen by the data: data=imagefolder experiment=photographs\nmodel:\n")
    assert call("train", "--cfg").stdout.startswith("model:\n")
    assert "data.root=FOLDER without data= is short for experiment=photo" in call("train", "--help").stdout


@pytest.mark.runs
def test_a_run_says_pixels_tokens_and_the_time_to_expect(call: Command, image_folder: Path) -> None:
    small = ["trainer.batch_size=4", "trainer.log_every_steps=1", "trainer.epochs=3", "trainer.max_steps=4"]
    done = call("train", *QUICK[1:], f"data.root={image_folder}", "run_dir=run", *small, "model.registers=2")
    assert done.returncode == 0, done.stderr
    lines = " ".join(done.stdout.split())
    first = "images: 224 x 224 pixels in patches of 16: 199 tokens, of which 14 x 14 are patches, and a class"
    assert first in lines
    assert lines.index(first) < lines.index("model: reattention, 2 blocks") < lines.index("step 1/4")
    assert lines.count("to expect: ") == 1
    assert "for all 4 steps" in lines
    result = json.loads((image_folder.parent / "run" / "result.json").read_text())
    assert "val/top1" in result
