"""Write what a weights file says about its model, and read it back strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deepvit_train.config.data import DataName
from deepvit_train.config.preset import model_preset
from deepvit_train.error import CheckpointError
from deepvit_train.run.description import DESCRIPTION, ModelDescription, read_description

WHOLE = ModelDescription(
    model_preset("deepvit_s"), ["b", "a"], data=DataName.imagefolder, seed=7, calibrate_images=512
)


def saved(folder: Path, header: dict[str, str] | None) -> Path:
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors", metadata=header)
    return folder / "model.safetensors"


@pytest.mark.parametrize("description", [WHOLE, ModelDescription(model_preset("vit_16b"))])
def test_a_description_is_read_back_as_it_was_written(tmp_path: Path, description: ModelDescription) -> None:
    assert read_description(saved(tmp_path, description.header())) == description


def test_the_text_is_that_of_version_0_1(tmp_path: Path) -> None:
    content = json.loads(WHOLE.header()[DESCRIPTION])
    assert set(content) == {"format", "model", "attn", "classes", "data", "seed", "calibrate_images"}
    assert (content["format"], content["data"], content["classes"]) == (1, "imagefolder", ["b", "a"])
    assert WHOLE.header()[DESCRIPTION] == json.dumps(content, sort_keys=True)


def test_a_file_of_another_program_has_none(tmp_path: Path) -> None:
    assert read_description(saved(tmp_path, None)) is None
    assert read_description(saved(tmp_path, {"format": "pt"})) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"model": {}},
        {"attn": None},
        {"data": "a folder"},
        {"seed": "x"},
        {"classes": 3},
    ],
)
def test_a_description_that_this_version_does_not_know_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    content = json.loads(WHOLE.header()[DESCRIPTION]) | changes
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its description can't be used"):
        read_description(saved(tmp_path, {DESCRIPTION: json.dumps(content)}))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_text_that_describes_no_model_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="its description can't be used"):
        read_description(saved(tmp_path, {DESCRIPTION: text}))
