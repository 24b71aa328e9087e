"""Train on two hosts, which are network namespaces: one is cut off and comes back, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.test_distributed import SAME
from tests.fault.test_kill import lines_logged, metrics, outcome

pytestmark = [pytest.mark.runs, pytest.mark.slow, pytest.mark.xdist_group("ranks")]
HOSTS = ("deepvit-host0", "deepvit-host1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces with a cable between them."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs leave to make network namespaces (ip netns add)")
    try:
        ip("link", "add", "cable0", "netns", HOSTS[0], "type", "veth", "peer", "cable1", "netns", HOSTS[1])
        for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
            ip("-n", host, "addr", "add", f"{address}/24", "dev", f"cable{number}")
            ip("-n", host, "link", "set", f"cable{number}", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            ip("netns", "del", host)


def train_on_both(*overrides: str) -> list[subprocess.Popen[str]]:
    """One rank a host; they meet at the first host's address."""
    processes = []
    for number, (host, address) in enumerate(zip(HOSTS, ADDRESSES, strict=True)):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        meeting = ["--rdzv-backend=c10d", "--rdzv-id=test", f"--rdzv-endpoint={ADDRESSES[0]}:29577"]
        command = [
            *launcher,
            *meeting,
            f"--local-addr={address}",
            f"--rdzv-conf=is_host={number == 0}",
            "-m",
            "deepvit_train.cli",
            "train",
        ]
        environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *command, *overrides],
                env=os.environ | environment | {"GLOO_SOCKET_IFNAME": f"cable{number}"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def test_a_host_cut_off_ends_the_run_and_brought_back_goes_on(
    hosts: None, digits: Path, tmp_path: Path
) -> None:
    run = [*SAME, "trainer.epochs=40", "trainer.eval_every_epochs=10", "trainer.log_every_steps=1"]
    run.append("trainer.timeout_s=15")
    for process in train_on_both(*run, f"run_dir={tmp_path / 'whole'}"):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors

    folder = tmp_path / "run"
    processes = train_on_both(*run, f"run_dir={folder}")
    while lines_logged(folder) < 20:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ip("-n", HOSTS[1], "link", "set", "cable1", "down")
    _, errors = processes[0].communicate(timeout=240)
    assert processes[0].returncode != 0
    assert "another rank died or hangs" in errors
    assert "the same command goes on from the last checkpoint" in errors
    ip("-n", HOSTS[1], "link", "set", "cable1", "up")
    # torchrun on the other host hangs as long as it is cut off, then finds the meeting place gone.
    processes[1].communicate(timeout=240)
    assert processes[1].returncode != 0

    for process in train_on_both(*run, f"run_dir={folder}"):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert outcome(folder) == outcome(tmp_path / "whole")
    assert metrics(folder) == metrics(tmp_path / "whole")
