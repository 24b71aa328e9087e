"""Export as a user does: the file runs without this project, and a file that differs is never left behind."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepvit_train.commands import export_file, export_reader, train
from deepvit_train.commands.export_check import Answers, CheckImages, compare, refuse_if_worse, their_answers
from deepvit_train.commands.export_model import traced
from deepvit_train.config.compose import compose_command
from deepvit_train.error import UserError
from deepvit_train.evaluation.loaded import load
from deepvit_train.run.checkpoint import digest_of
from deepvit_train.run.found import find
from tests.conftest import QUICK, Command, slowly

COMMON = ["threads=1", "data.workers=0"]
LONGER = ["trainer.epochs=3", "trainer.limit_batches=44", "optim.lr=0.003", "trainer.log_every_steps=44"]

# The program of docs/export.md, which has the file alone, and packages besides this project and torch.
PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SERVICE = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
WITHOUT_US = "import sys\nfor name in ('deepvit_train', 'torch', 'timm'): sys.modules[name] = None\n"
COUNT = """
hits = 0
for file in sys.argv[1:]:
    with open(file, "rb") as opened:
        hits += classify(opened.read())["class"] == file.split("/")[-2]
print(hits)
"""


def trained(folder: Path, *options: str) -> Path:
    train.run(compose_command("train", [*QUICK, *LONGER, f"run_dir={folder}", *options]))
    return folder


@pytest.fixture(scope="module")
def mixed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with re-attention, long enough for the model to tell images apart."""
    return trained(tmp_path_factory.mktemp("mixed") / "run")


@pytest.fixture(scope="module")
def plain(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with plain attention, registers and LayerScale."""
    options = ["attn=self", "model.registers=2", "model.layer_scale=0.1"]
    return trained(tmp_path_factory.mktemp("plain") / "run", *options)


def check_report(report: dict[str, Any], run: Path, top1: float) -> None:
    """Check what model.json says against what is known otherwise."""
    check = report["check"]
    assert check["images"] == 364
    assert check["top1"] == check["top1_exported"] == pytest.approx(top1)
    assert check["top1"] > 0.15  # or the model tells nothing apart, and agreement means nothing
    assert check["top1_agreement"] == 1.0
    assert 0 < check["largest_difference"] < 1e-4
    assert 0 < check["rounding"] < 1e-4
    assert report["classes"] == [str(digit) for digit in range(10)]
    assert report["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert report["preprocessing"]["resized"] == 16
    assert report["digests"]["checkpoint"] == digest_of(find(str(run)).file)
    assert report["digests"]["file"] == digest_of(Path("out") / report["file"])
    assert len(report["digests"]["data"]) == 32


@pytest.mark.parametrize("form", ["onnx", "pt2", "timm"])
def test_the_other_program_gives_the_same_answers(
    call: Command, mixed: Path, plain: Path, digits: Path, form: str
) -> None:
    run = plain if form == "timm" else mixed
    top1 = json.loads(call("eval", str(run), *COMMON).stdout.splitlines()[-1])["top1"]
    result = call("export", str(run), "out=out", f"format={form}", *COMMON)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    report = json.loads(Path("out/model.json").read_text())
    check_report(report, run, top1)
    assert json.loads(result.stdout.splitlines()[-1])["top1"] == report["check"]["top1"]
    # No name of this machine's folders leaves with the file, which is not compressed.
    content = (Path("out") / report["file"]).read_bytes()
    assert b".py" not in content
    assert str(run).encode() not in content
    if form == "onnx":
        files = sorted(map(str, (digits / "val").glob("*/*.png")))
        program = WITHOUT_US + SERVICE.replace("__main__", "served") + COUNT
        command = [sys.executable, "-I", "-c", program, *files]
        done = subprocess.run(command, cwd="out", capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) / 364 == pytest.approx(top1, abs=0.005)  # Pillow rounds otherwise
    if form == "timm":
        # And back: timm's file is one that this project reads, which says all but the number of heads.
        back = call("eval", "out/model.safetensors", "heads=2", "data=digits", "crop_pct=1.0", *COMMON)
        assert json.loads(back.stdout.splitlines()[-1])["top1"] == pytest.approx(top1)


@pytest.mark.runs
@pytest.mark.parametrize("numbers", [slowly("fp16"), "int8"])
def test_the_loss_of_smaller_numbers_is_measured(call: Command, mixed: Path, numbers: str) -> None:
    assert call("export", str(mixed), "out=whole", *COMMON).returncode == 0
    result = call("export", str(mixed), "out=small", f"numbers={numbers}", "accuracy_loss=0.2", *COMMON)
    assert result.returncode == 0, result.stderr
    check = json.loads(Path("small/model.json").read_text())["check"]
    assert 1e-4 < check["largest_difference"] < 1
    assert check["top1_agreement"] > 0.8
    assert check["accepted_difference"] is None
    assert Path("small/model.onnx").stat().st_size < Path("whole/model.onnx").stat().st_size
    refused = call("export", str(mixed), "out=no", f"numbers={numbers}", "tolerance=1e-6", *COMMON)
    assert refused.returncode == 1
    assert "logits differ by" in refused.stderr
    assert not Path("no").exists()


@pytest.mark.runs
def test_only_so_many_images_are_compared_in_whole_batches(call: Command, mixed: Path) -> None:
    result = call("export", str(mixed), "out=out", "format=pt2", "check_images=20", "batch_size=16", *COMMON)
    assert result.returncode == 0, result.stderr
    assert json.loads(Path("out/model.json").read_text())["check"]["images"] == 32


@pytest.mark.runs
def test_a_file_without_statistics_is_calibrated_first(call: Command, mixed: Path, tmp_path: Path) -> None:
    shutil.copy(find(str(mixed)).file, tmp_path / "lone.safetensors")
    top1 = json.loads(call("eval", "lone.safetensors", *COMMON).stdout.splitlines()[-1])["top1"]
    result = call("export", "lone.safetensors", "out=out", "format=pt2", *COMMON)
    assert "calibrating on 64 training images" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["top1_exported"] == pytest.approx(top1)


def test_what_needs_this_project_is_found_out(mixed: Path, tmp_path: Path) -> None:
    """The process that runs a file must not be able to run one that holds this project's operator."""
    model = load(str(mixed), "auto").model
    torch.export.save(traced(model), tmp_path / "model.pt2")
    images = CheckImages(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), [])
    with pytest.raises(UserError, match="can't be run without this project"):
        their_answers("pt2", tmp_path / "model.pt2", images, 2, 1)
    refusal = export_reader.Refusal(export_reader.WITHOUT["onnx"])
    for name in ("deepvit_train.models", "torch", "timm.models"):
        with pytest.raises(ImportError, match="not to be had"):
            refusal.find_spec(name)
    assert refusal.find_spec("torchx") is None


def answers(*rows: list[float]) -> Answers:
    return Answers("a program", torch.tensor(rows), 1.0)


def test_a_comparison_by_hand(mixed: Path) -> None:
    config = compose_command("export", ["checkpoint=x", "out=y"])
    images = CheckImages(torch.zeros(3, 1), torch.tensor([0, 1, 1]), [2])
    ours = answers([3.0, 1.0, 9.0], [1.0, 2.0, 0.0], [4.0, 1.0, 0.0])
    theirs = answers([3.0, 1.0, 9.0], [2.5, 2.0, 0.0], [4.0, 1.0, 0.0])
    check = compare(ours, theirs, images, config)
    # Output 2 has no class in the data. The first image is right in both, the second in ours alone.
    assert (check["top1"], check["top1_exported"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert check["top1_agreement"] == pytest.approx(2 / 3)
    assert (check["largest_difference"], check["largest_logit"]) == (1.5, 9.0)
    assert check["accepted_difference"] == pytest.approx(9e-4)
    rounded = compare(replace(ours, rounding=0.5), theirs, images, config)
    assert rounded["accepted_difference"] == 2.0
    with pytest.raises(UserError, match=r"logits differ by 1\.5, more than 0\.0009"):
        refuse_if_worse(check, "y")
    with pytest.raises(UserError, match=r"top-1 falls from 0\.6667 to 0\.3333"):
        refuse_if_worse({**check, "accepted_difference": None}, "y")
    refuse_if_worse({**check, "accepted_difference": 2.0, "accepted_accuracy_loss": 0.5}, "y")
    lost = compare(ours, answers(*[[math.nan] * 3] * 3), images, config)
    assert lost["top1_exported"] == 0
    with pytest.raises(UserError, match="logits differ by nan"):
        refuse_if_worse(lost, "y")


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    call: Command, mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        export_file.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    result = call("export", str(mixed), "out=out", *COMMON)
    assert result.returncode == 2
    assert "needs onnxscript: pip install 'deepvit-train[export]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (
            ["format=timm"],
            2,
            "format=timm: holds plain attention alone, so attn=reattention can't be written",
        ),
        (
            ["format=pt2", "numbers=int8"],
            2,
            "numbers=int8: format=pt2 is written in fp32; nearest: format=onnx",
        ),
        (["format=onx"], 2, "did you mean 'onnx'?"),
        (["out=full", "format=pt2"], 6, "full: holds something already"),
        (["data=imagefolder", "data.root=nowhere"], 4, "data.root=nowhere: no such folder"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_line(
    call: Command, mixed: Path, tmp_path: Path, arguments: list[str], code: int, told: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    out = [] if any(each.startswith("out=") for each in arguments) else ["out=out"]
    result = call("export", str(mixed), *out, *arguments, *COMMON)
    assert result.returncode == code, result.stderr
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
