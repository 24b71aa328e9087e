"""The page that a run writes at its end: whole, escaped, without requests, and no reason to fail."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from deepvit_train.commands import train
from deepvit_train.commands.train_page import POINTS, _thinned
from deepvit_train.config.compose import compose_command
from tests.conftest import QUICK


def trained(folder: Path, *more: str) -> dict[str, Any]:
    overrides = [*QUICK, "trainer.report=true", f"run_dir={folder}", *more]
    return train.run(compose_command("train", overrides))


def test_a_run_writes_its_page(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = trained(tmp_path / "run", "name=<script>alert(1)", "optim.lr=0.002")
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out.splitlines()
    assert f"val/top1 {result['val/top1']:.4f}" in page
    best = int((tmp_path / "run" / "checkpoints" / "best").readlink().name.removeprefix("step_"))
    end = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())["step"]
    top1 = f"{result['val/top1']:.3f} of 364 validation images"
    assert f"<strong>Top-1 {top1} at step {end} (best: step {best})<" in page
    assert re.search(r"<code>optim.lr</code></th><td><code>0.002<", page)
    assert "<script" not in page
    assert "Run &lt;script&gt;alert(1)" in page
    # The figures are in the file, and nothing else is asked for.
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_that_can_not_be_written_is_no_failure(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "run", "trainer.max_steps=3", "trainer.report=false")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('7\n{"step": 3, "train/loss": "high"}\n')  # no line of a run's own
    (tmp_path / "run" / "curves.png").mkdir()
    assert "val/top1" in trained(tmp_path / "run")
    assert "warning: the report was not written: " in capsys.readouterr().out


def test_a_run_that_goes_on_has_no_page_of_its_former_end(digits: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", "trainer.max_steps=3")
    assert " at step 3 (best: step " in (tmp_path / "run" / "report.html").read_text()
    trained(tmp_path / "run", "trainer.max_steps=6", "trainer.report=false")
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_long_curve_is_drawn_as_means_of_neighbours() -> None:
    points = [(step, float(step % 7)) for step in range(1001)]
    drawn = _thinned(points)
    assert len(drawn) <= POINTS
    assert drawn[0] == (fmean(range(4)), fmean([0.0, 1, 2, 3]))
    assert _thinned(points[:POINTS]) == points[:POINTS]
