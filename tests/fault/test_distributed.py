"""Train in two processes under torchrun: same samples as one, one folder, and stops they agree on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.training import loop
from tests.conftest import QUICK, as_ranks, forked
from tests.fault.test_kill import lines_logged, metrics, outcome

# One at a time: two ranks take both cores, and two tests could find the same port to be free.
pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("ranks")]

# LayerNorm over heads: unless synchronised, BatchNorm's statistics are each rank's own, not one process's.
ANY = [*QUICK, "trainer.ema_decay=0.9", "trainer.save_every_steps=3"]
SAME = [*ANY, "attn=reattention_vit_pytorch"]
SYNCHRONISED = [*ANY, "attn=reattention", "trainer.sync_norm=true", "trainer.accumulate=2"]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def torchrun(*arguments: str, options: tuple[str, ...] = (), **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *LAUNCHER, *options, "-m", "deepvit_train.cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    said, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return said


def begin(folder: Path, *overrides: str) -> dict[str, object]:
    return train.run(compose_command("train", [*overrides, f"run_dir={folder}"]))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def test_two_ranks_train_as_one_process_does_and_evaluate_every_image_once(
    digits: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert forked(lambda: train.run(compose_command("train", [*SAME, f"run_dir={one}"]))) == 0
    said = finish(torchrun("train", *SAME, f"run_dir={two}")).splitlines()
    assert said[0] == said[-1] == f"run folder: {two}"
    assert sum(line.startswith("step 12:") for line in said) == 1  # one rank prints
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=1e-3, atol=1e-5)

    said = finish(torchrun("eval", f"checkpoint={one}", "threads=1", "batch_size=50", "report=false"))
    report = json.loads(said.splitlines()[-1])
    assert report["images"] == 364
    best = json.loads((one / "checkpoints" / "best" / "state.json").read_text())["best"]
    assert report["top1"] == best["val_ema/top1"]
    assert report["loss"] == pytest.approx(best["val_ema/loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.accumulate=2"],
        # Statistics that no calibration measures, and those of a stem that none ever does.
        pytest.param(["model.stem=cnn", "trainer.calibrate_images=0"], id="running statistics"),
        pytest.param(["trainer.compile=true"], id="compiled", marks=pytest.mark.slow),
    ],
)
def test_three_ranks_go_on_bit_for_bit(
    options: list[str], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_stopped, stopped = tmp_path / "never-stopped", tmp_path / "stopped"
    run = [*ANY, "trainer.batch_size=36", "trainer.save_every_steps=4", "model.dropout=0.1", *options]
    step = loop.train_step

    def break_off(state: loop.TrainState, *arguments: object, **named: object) -> object:
        """After step 4: between two saves, and between two lines of the log."""
        if state.step == 5:
            raise KeyboardInterrupt
        return step(state, *arguments, **named)

    def begin_and_break_off() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(loop, "train_step", break_off)
            with pytest.raises(KeyboardInterrupt):
                begin(stopped, *run)

    parts = partial(begin, never_stopped, *run), begin_and_break_off, partial(begin, stopped, *run)
    assert as_ranks(3, *parts) == 0
    assert outcome(stopped) == outcome(never_stopped)
    assert metrics(stopped) == metrics(never_stopped)


@pytest.mark.slow
def test_synchronised_batchnorm_trains_as_one_process_does(digits: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert forked(lambda: train.run(compose_command("train", [*SYNCHRONISED, f"run_dir={one}"]))) == 0
    finish(torchrun("train", *SYNCHRONISED, f"run_dir={two}"))
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 7, 10])
def test_few_images_on_two_ranks_count_once(images: int, image_folder: Path, tmp_path: Path) -> None:
    data = ["data=imagefolder", f"data.root={image_folder}", "trainer.batch_size=8"]
    run = tmp_path / "run"
    assert forked(lambda: train.run(compose_command("train", [*SAME, *data, f"run_dir={run}"]))) == 0
    said = finish(
        torchrun("eval", f"checkpoint={run}", "threads=1", "batch_size=1", f"limit_batches={images}")
    )
    # limit_batches holds for each rank: 9 validation images in all.
    assert json.loads(said.splitlines()[-1])["images"] == min(9, 2 * images)


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step_and_go_on_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    run = [*SAME, "trainer.epochs=8", "trainer.log_every_steps=1"]
    finish(torchrun("train", *run, f"run_dir={tmp_path / 'whole'}"))
    process = torchrun("train", *run, f"run_dir={tmp_path / 'run'}")
    while lines_logged(tmp_path / "run") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "stopped by SIGTERM; saved" in errors
    finish(torchrun("train", *run, f"run_dir={tmp_path / 'run'}"))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("options", [SAME, [*ANY, "trainer.shard=true"]], ids=["replicated", "sharded"])
def test_a_killed_rank_is_restarted_by_torchrun_and_the_run_resumes(
    options: list[str], digits: Path, tmp_path: Path
) -> None:
    run = [*options, "trainer.epochs=8", "trainer.log_every_steps=1"]
    finish(torchrun("train", *run, f"run_dir={tmp_path / 'whole'}"))
    process = torchrun(
        "train",
        *run,
        f"run_dir={tmp_path / 'run'}",
        options=("--max-restarts=2",),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",  # see docs/cluster.md
    )
    while lines_logged(tmp_path / "run") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    victim = ranks_of(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    said = finish(process)
    assert re.search(r"resumed from .* at step \d+ of 48", said)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_hung_rank_ends_the_run_with_a_hint(digits: Path, tmp_path: Path) -> None:
    run = [*SAME, "trainer.epochs=400", "trainer.log_every_steps=1", "trainer.timeout_s=5"]
    process = torchrun("train", *run, f"run_dir={tmp_path / 'run'}")
    while lines_logged(tmp_path / "run") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    victim = ranks_of(process.pid)[-1]
    os.kill(victim, signal.SIGSTOP)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "another rank died or hangs" in errors


@pytest.mark.slow
def test_one_two_and_one_process_take_turns(digits: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = [*SAME, "trainer.epochs=3"]
    assert forked(lambda: train.run(compose_command("train", [*run, f"run_dir={whole}"]))) == 0
    first = [*run, f"run_dir={parts}", "trainer.max_steps=6"]
    finish(torchrun("train", *first))
    second = [*run, f"run_dir={parts}", "trainer.max_steps=12"]
    assert forked(lambda: train.run(compose_command("train", second))) == 0
    finish(torchrun("train", *run, f"run_dir={parts}"))
    for left, right in zip(metrics(whole), metrics(parts), strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-6)


def ranks_of(torchrun_pid: int) -> list[int]:
    """The processes that torchrun started, by rank."""
    children = Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children").read_text().split()
    ranked = {}
    for pid in map(int, children):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranked |= {int(each[5:]): pid for each in environment if each.startswith(b"RANK=")}
    return [ranked[rank] for rank in sorted(ranked)]
