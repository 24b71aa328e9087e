"""What errors of others are translated to, and which names count as near."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from deepvit_train.cli import main
from deepvit_train.determinism import deterministic_kernels
from deepvit_train.error import explain, nearest, slips, spelled
from tests.conftest import forked


def test_no_compiler_is_told_of_with_the_key(tmp_path: Path) -> None:
    def work() -> None:
        from torch._inductor import config

        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
        config.cpp.cxx = (None, str(tmp_path / "no compiler"))
        with pytest.raises(RuntimeError) as error:
            torch.compile(nn.Sequential(nn.Linear(3, 5), nn.GELU()))(torch.zeros(2, 3))
        told = str(explain(error.value, "train"))
        assert told.startswith("torch.compile failed (")
        assert "nearest: trainer.compile=" in told
        assert len(told.splitlines()) == 2

    # In a process of its own: a compiled model starts threads, after which this one could not be forked.
    assert forked(work) == 0


def test_an_operation_without_a_deterministic_kernel_is_told_of_with_the_key() -> None:
    with deterministic_kernels(True), pytest.raises(RuntimeError) as error:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    first, second = str(explain(error.value, "train")).splitlines()
    assert "put_" in first
    assert second == "nearest: trainer.deterministic=false"


def test_torchrun_is_told_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as end:
        main(["train", "model.depth=0"])
    assert end.value.code == 2
    said = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "model.depth=0: must be at least 1" in said["message"]
    assert "override" not in said["extraInfo"]["py_callstack"]  # no frames of where it came from


@pytest.mark.parametrize(
    ("word", "other", "count"),
    [("depht", "depth", 1), ("depth", "Depth", 0), ("", "ab", 2), ("norm", "nrom", 1), ("cat", "dog", 3)],
)
def test_slips_are_counted(word: str, other: str, count: int) -> None:
    assert slips(word, other) == slips(other, word) == count


@pytest.mark.parametrize(
    ("word", "known", "found"),
    [
        ("evaluate", ["eval", "train"], "; did you mean 'eval'?"),
        ("reatention", ["self", "reattention"], "; did you mean 'reattention'?"),
        ("ab", ["ac", "bb"], ""),
        ("swin", ["vit", "self"], ""),
        ("validation", ["train", "test"], ""),
        ("\uff56al", ["val"], "; did you mean 'val'? It differs from '\\uff56al' in its Unicode form only"),
    ],
)
def test_a_name_is_suggested_only_where_it_is_near(word: str, known: list[str], found: str) -> None:
    assert nearest(word, known) == found


def test_words_that_look_alike_are_spelled_out() -> None:
    assert spelled("é", ["e", "é"]) == "é"
    assert spelled("é", ["e\u0301"]) == r"'\xe9'"
