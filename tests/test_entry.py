"""Every command under every fault of its surroundings: a line or two, the documented exit code, no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from tests.conftest import QUICK, Command
from tests.test_cli import refused

LONG_NAME = "x" * 256
# Each key that holds a path: the command, the other keys that it needs, the key, and the exit code.
PATHS = [
    ("train", [], "run_dir", 6),
    ("train", [], "resume", 3),
    ("train", [], "model.weights", 3),
    ("train", ["data=imagefolder"], "data.root", 4),
    ("train", [], "data.class_map", 4),
    ("train", ["model.weights=none.pt"], "classes", 4),
    ("train", ["-m", "seed=0,1"], "resume", 3),
    ("eval", [], "checkpoint", 3),
    ("eval", ["checkpoint=run"], "data.root", 4),
    ("eval", ["checkpoint=run"], "data.class_map", 4),
    ("eval", ["checkpoint=run"], "classes", 4),
    ("convert", ["out=out"], "source", 3),
    ("convert", ["source=run"], "out", 6),
    ("convert", ["source=run", "out=out"], "classes", 4),
    ("bench", [], "out", 6),
    ("bench", ["vary=model.depth", "values=[1,2]"], "plot", 6),
    ("data check", [], "root", 4),
    ("data check", ["root=images"], "data.class_map", 4),
    ("analyze", [], "checkpoint", 3),
    ("analyze", ["checkpoint=run"], "compare", 3),
    ("analyze", ["checkpoint=run"], "out", 6),
    ("analyze", ["checkpoint=run"], "data.root", 4),
    ("analyze", ["checkpoint=run"], "classes", 4),
    ("study", [], "root", 4),
    ("study", ["root=images"], "out", 6),
    ("data demo", [], "out", 6),
    ("data fashion-mnist", [], "out", 6),
    ("data fashion-mnist", ["out=out"], "source", 4),
]
FAULTS = {
    "unknown user": "~nosuchuser/x",
    "long name": LONG_NAME,
    "long name in a missing folder": f"missing/{LONG_NAME}",
    "long path": "x/" * 3000,
    "links in a circle": "circle",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("command", "others", "key", "exit_code"), PATHS)
def test_a_path_that_leads_nowhere(
    call: Command, tmp_path: Path, command: str, others: list[str], key: str, exit_code: int, fault: str
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    ending = ".png" if key == "plot" else ""
    result = call(*command.split(), *others, f"{key}={FAULTS[fault]}{ending}")
    refused(result, exit_code, f"{key}={FAULTS[fault][:50]}")
    assert len(result.stderr) < 1000
    assert [entry.name for entry in tmp_path.iterdir()] == ["circle"]
