"""Type the commands as a user does: check what they print and their exit codes; no traceback appears."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.table import Table

from deepvit_train.commands import train
from deepvit_train.config import compose, override, shipped
from deepvit_train.config.command import COMMANDS
from deepvit_train.config.compose import compose_command
from deepvit_train.config.help import summary
from deepvit_train.console import (
    PLAIN,
    EscapingStream,
    OutlivingStream,
    console,
    printable,
    tell_error,
)
from deepvit_train.error import ConfigError, Interrupted
from deepvit_train.run import checkpoint
from deepvit_train.run.folder import RunFolder
from tests.conftest import QUICK, Command

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished quick run; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train.run(compose_command("train", [*QUICK, f"run_dir={folder}", "trainer.ema_decay=0.9"]))
    return folder


def refused(result: subprocess.CompletedProcess[str], exit_code: int, *told: str) -> None:
    """Check that a command failed as a user should see it: one or two lines, no traceback."""
    assert result.returncode == exit_code, result.stderr
    lines = result.stderr.strip().splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 2, result.stderr
    for part in told:
        assert part in result.stderr


def test_train_and_evaluate_as_typed(command: Command, tmp_path: Path) -> None:
    trained = command("train", *QUICK)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    lines = trained.stdout.splitlines()
    assert lines[0] == lines[-1] == "run folder: runs/digits-reattention-d2-s0"
    assert "5,742 parameters" in trained.stdout
    run = tmp_path / "runs" / "digits-reattention-d2-s0"

    evaluated = command("eval", f"checkpoint={run}", "threads=1", cwd=tmp_path.parent)
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads(evaluated.stdout.splitlines()[-1])
    assert {"top1", "top5", "loss", "images", "images_per_s"} <= set(report)
    assert report["images"] == 364
    best = (run / "checkpoints" / "best").resolve()
    written = json.loads(best.with_name(f"{best.name}.live.val.json").read_text())
    assert written["top1"] == report["top1"]
    classes = written["classes"]
    assert sum(each["images"] for each in classes.values()) == 364
    assert sum(each["top1"] * each["images"] for each in classes.values()) == pytest.approx(
        report["top1"] * 364
    )


@pytest.mark.parametrize("form", ["run", "checkpoint", "last", "file"])
def test_every_way_to_name_a_checkpoint(call: Command, trained: Path, form: str, tmp_path: Path) -> None:
    folder = checkpoint.checkpoints_in(trained / "checkpoints")[-1]
    lone = tmp_path / "lone.safetensors"
    shutil.copy(folder / "ema.safetensors", lone)
    path = {"run": trained, "checkpoint": folder, "last": trained / "checkpoints" / "last", "file": lone}[
        form
    ]
    result = call(
        "eval", f"checkpoint={path}", "threads=1", "limit_batches=1", "batch_size=50", "report=false"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["images"] == 50
    assert ("calibrating on 64 training images" in result.stdout) == (form == "file")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "told"),
    [
        (["train", "attn=reatention"], 2, ["did you mean 'reattention'?"]),
        (["train", "model.depht=3"], 2, ["model.depht", "did you mean 'model.depth'?"]),
        (["train", "model.depth=0"], 2, ["model.depth=0: must be at least 1"]),
        (["train", "model.image_size=30"], 2, ["not divisible by model.patch_size=4"]),
        (["train", "attn.from_block=6"], 2, ["attn.from_block=6 is beyond model.depth=6"]),
        (["train", "model.pool=max"], 2, ["model.pool=max"]),
        (["train", "experiment=deepvit_s"], 2, ["data.root"]),
        (["train", "data=imagefolder", "data.root=/nowhere/at/all"], 4, ["/nowhere/at/all"]),
        (["train", "resume=nowhere"], 3, ["nowhere"]),
        (["train", "run_dir=/proc/run"], 6, ["run_dir=/proc/run"]),
        (["train", "trainer.batch_size=5000"], 2, ["nearest: trainer.batch_size=1433"]),
        (["eval"], 2, ["checkpoint is not given"]),
        (["eval", "checkpoint=nowhere", "data=imagefolder", "data.root=/nowhere"], 3, ["nowhere"]),
        (["train", "loss=bcf"], 2, ["did you mean 'bce'?"]),
        (["study", "root=/nowhere/at/all"], 4, ["/nowhere/at/all"]),
        (["evaluate"], 2, ["did you mean 'eval'?"]),
        (["train", "--hlep"], 2, ["--help"]),
        (["train", "--model", "vit_small_patch16_224"], 2, ["--model: an option of timm's", "--from-timm"]),
        (["train", "data=digits", "--batch-size=64"], 2, ["--batch-size=64: an option", "--from-timm"]),
        (["eval", "--checkpoint", "x"], 2, ["--checkpoint: no such option"]),
    ],
)
def test_a_mistake_is_explained(
    call: Command, arguments: list[str], exit_code: int, told: list[str], tmp_path: Path
) -> None:
    refused(call(*arguments), exit_code, *told)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kind: [reattention\n", ["attn/own.yaml, line 2: not YAML"]),
        ("defaults: [base]\nnorm: batch\nnorm: none\n", ["attn/own.yaml, line 3", "duplicate key norm"]),
        (
            "defaults: [base]\nnorm: batchnorm\n",
            ["attn/own.yaml: attn.norm", "centred, attn_scale, none"],
        ),
        ("defaults: [base]\nnrom: batch\n", ["attn/own.yaml: attn.nrom", "did you mean 'attn.norm'?"]),
        ("defaults: [bass]\n", ["attn/own.yaml: Could not load 'attn/bass'"]),
        ("kind: self\n", ["attn.dropout", "the YAML file of attn= must begin with `defaults: [base]`"]),
    ],
)
def test_a_mistake_in_a_yaml_file_is_named(
    call: Command, text: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shipped.config_dir(), tmp_path / "configs")
    (tmp_path / "configs" / "attn" / "own.yaml").write_text(text)
    for module in (shipped, override, compose):
        monkeypatch.setattr(module, "config_dir", lambda: tmp_path / "configs")
    refused(call("train", "attn=own"), 2, *told)


def test_the_configurations_of_a_sweep_are_printed(call: Command) -> None:
    result = call("train", "-m", "--cfg", "model.depth=4,8", "attn=self,reattention")
    documents = list(yaml.safe_load_all(result.stdout))
    seen = [(each["model"]["depth"], each["attn"]["kind"], each["name"]) for each in documents]
    assert seen == [
        (depth, attn, f"digits-{attn}-d{depth}-s0") for depth in (4, 8) for attn in ("self", "reattention")
    ]


def test_help_of_several_commands_lists_their_keys(call: Command) -> None:
    told = call("data", "--help").stdout
    assert re.search(r"check .*\n +keys: root, data\.\*", told)
    assert re.search(r"fashion-mnist .*\n +keys: out, source\n", told)


def test_a_root_without_splits_is_named(call: Command, tmp_path: Path) -> None:
    (tmp_path / "root" / "training").mkdir(parents=True)
    result = call("train", "data=imagefolder", "data.root=root", "run_dir=run")
    refused(result, 4, "root/train", "training")
    assert not (tmp_path / "run").exists()


def test_evaluating_other_classes_names_them(call: Command, trained: Path, image_folder: Path) -> None:
    result = call("eval", f"checkpoint={trained}", "data=imagefolder", f"data.root={image_folder}")
    refused(result, 4, "ant", "missing: 0, 1")


def test_another_image_size_calibrates_anew(call: Command, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    best = (tmp_path / "run" / "checkpoints" / "best").resolve()
    result = call("eval", "checkpoint=run", "image_size=24", "calibrate_images=40")
    assert result.returncode == 0, result.stderr
    assert "at 24 pixels: calibrating on 40 training images" in result.stdout
    assert "warning" not in result.stdout
    report = json.loads(result.stdout.splitlines()[-1])
    assert (report["images"], report["image_size"]) == (364, 24)
    assert best.with_name(f"{best.name}.ema.val.24px.json").exists()
    refused(call("eval", "checkpoint=run", "image_size=25"), 2, "image_size=25", "nearest: 24")
    # Nine times as many patches along each side of the grid are (9 x 9) squared times as many weights.
    few = ["calibrate_images=2", "limit_batches=1", "batch_size=2", "threads=1"]
    large = call("eval", "checkpoint=run", "image_size=144", *few)
    assert "image_size=144: 1,296 patches of an image instead of 16" in large.stdout
    assert "6,561 weights for one" in large.stdout


def test_an_unreadable_image_is_an_error_in_evaluation(
    call: Command, trained: Path, digits: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits, tmp_path / "digits")
    broken = next((tmp_path / "digits" / "val" / "3").iterdir())
    broken.write_bytes(broken.read_bytes()[:40])
    result = call("eval", f"checkpoint={trained}", f"data.root={tmp_path / 'digits'}")
    refused(result, 4, str(broken))


def test_without_statistics_or_training_images_evaluation_is_refused(
    call: Command, trained: Path, digits: Path, tmp_path: Path
) -> None:
    lone = tmp_path / "lone.safetensors"
    shutil.copy(trained / "checkpoints" / "last" / "model.safetensors", lone)
    shutil.copytree(digits / "val", tmp_path / "digits" / "val")
    result = call("eval", f"checkpoint={lone}", f"data.root={tmp_path / 'digits'}")
    refused(result, 3, "no calibrated statistics", "data.root=FOLDER with train/")


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest"])
def test_a_damaged_checkpoint_is_refused_before_data_is_touched(
    call: Command, trained: Path, damage: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoints" / "last", folder)
    file = folder / ("manifest.json" if damage == "manifest" else "ema.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    result = call("eval", f"checkpoint={folder}", "data=imagefolder", "data.root=/nowhere")
    refused(result, 3, "checkpoint")


@pytest.mark.parametrize(
    ("arguments", "head"),
    [
        ("train --help", "head -3"),
        ("train --cfg", "head -1"),
        ("bench --help", "head -1"),
        ("data --help", "head -1"),
        ("train --help", "true"),
        ("train --help 2>&1", "true"),
    ],
)
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_of_the_output_may_leave_early(arguments: str, head: str, buffered: str) -> None:
    command = f"{sys.executable} -m deepvit_train.cli {arguments} | {head}; exit ${{PIPESTATUS[0]}}"
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": buffered}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_error_that_nobody_reads_keeps_its_exit_code() -> None:
    command = f"{sys.executable} -m deepvit_train.cli train attn=x 2>&1 | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], env=ENVIRONMENT).returncode == 2


def test_a_training_goes_on_when_its_reader_leaves(digits: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "deepvit_train.cli", "train", *QUICK, "trainer.epochs=4", "run_dir=run"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "run folder: run\n"
        process.stdout.close()
        assert process.wait(timeout=300) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())


def test_a_closed_terminal_is_a_reader_that_left() -> None:
    terminal, behind = os.openpty()
    with open(behind, "w") as stream:  # noqa: PTH123 - a descriptor, not a path
        outliving = OutlivingStream(stream)
        assert outliving.isatty()
        os.close(terminal)
        assert outliving.write("nobody reads this\n") == 18
        outliving.flush()
        assert outliving.write("nor this\n") == 9
        outliving.flush()


@pytest.mark.parametrize(
    ("arguments", "streams", "exit_code"),
    [
        ("train --help", "> /dev/full", 6),
        ("train --cfg", "> /dev/full", 6),
        ("data --help", "> /dev/full", 6),
        ("train --help", ">&-", 0),
        ("train --help", ">&- 2>&- <&-", 0),
        ("train attn=x", "2> /dev/full", 2),
        ("train attn=x", "> /dev/full 2>&1", 2),
        ("train attn=x", "2>&-", 2),
    ],
)
def test_the_exit_code_says_what_was_done(arguments: str, streams: str, exit_code: int) -> None:
    command = f"{sys.executable} -m deepvit_train.cli {arguments} {streams}"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == exit_code
    told = "error: stdout: can't be written (No space left on device)\n" if exit_code == 6 else ""
    assert done.stderr == told


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\ttab, été, 犬\n", None),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x08", "a\\rb\\x08"),
        ("\x9b2J\x7f\x00", "\\x9b2J\\x7f\\x00"),
        ("\u202etxt.exe\u2066", "\\u202etxt.exe\\u2066"),
        ("\u2028", "\\u2028"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_steers_a_terminal_is_escaped(
    text: str, shown: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = text if shown is None else shown
    assert printable(text) == shown
    written = io.StringIO()
    stream = EscapingStream(OutlivingStream(written))
    stream.write(text)
    stream.writelines([text])
    assert written.getvalue() == shown * 2
    console.print(text, end="")
    assert capsys.readouterr().out == shown.expandtabs()


def test_a_notebook_gets_lines_and_no_html(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    type(console)(**PLAIN).print("step 1/2  loss 2.3")
    assert capsys.readouterr().out == "step 1/2  loss 2.3\n"


def test_a_table_of_hostile_names_is_as_wide_as_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[red]class", ":skull:")
    table.add_row("\x1b[31mred", "[b]1")
    console.print(table)
    told = capsys.readouterr().out
    assert "[red]class" in told
    assert ":skull:" in told
    assert "\\x1b[31mred" in told
    assert len({len(line) for line in told.splitlines()}) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_choices_and_values_as_they_are_typed(call: Command, command: str) -> None:
    told = call(command, "--help").stdout
    assert "deepvit_train." not in told
    assert "list[" not in told
    assert "<" not in told.replace("<pid>", "")
    if command == "train":
        assert "tracker (list of tensorboard|csv|trackio|wandb|mlflow) [[tensorboard]]" in told


def test_a_stopped_run_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = Interrupted("stopped by SIGINT; saved it", signal.SIGINT)
    for error in (stopped, ConfigError("a=1: no")):
        tell_error(error)
    assert capsys.readouterr().err == "stopped by SIGINT; saved it\nerror: a=1: no\n"
    assert stopped.exit_code == 130


def test_the_overview_says_what_each_command_does(call: Command) -> None:
    told = call("data", "--help").stdout
    for word, command in {
        "check": "data-check",
        "demo": "data-demo",
        "fashion-mnist": "data-fashion-mnist",
    }.items():
        assert re.search(rf"^  {word} +{re.escape(summary(command))}$", told, flags=re.MULTILINE)


@pytest.mark.runs
def test_two_writers_do_not_share_a_folder(tmp_path: Path, command: Command) -> None:
    with RunFolder(str(tmp_path / "run")):
        refused(command("train", *QUICK, "run_dir=run"), 6, "is writing there")
    assert not (tmp_path / "run" / "config.yaml").exists()
