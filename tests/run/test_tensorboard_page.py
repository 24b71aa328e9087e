"""Open a finished run in TensorBoard, in a headless Chromium, as a person sees it."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from tests.conftest import QUICK

CURVES = ("train/loss", "train/lr", "train/grad_norm", "val/top1", "val/loss")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.runs,
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)"),
]


@pytest.fixture
def page(digits: Path, tmp_path: Path) -> Iterator[str]:
    """The address of TensorBoard's page of a finished run."""
    train.run(compose_command("train", [*QUICK, f"run_dir={tmp_path / 'runs' / 'quick'}"]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path / "runs")]
    server = subprocess.Popen([*command, "--port", str(port), "--load_fast=false"], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
                if b"train/loss" in answer.read():
                    break
        except OSError:
            assert time.monotonic() < deadline
        time.sleep(0.5)
    yield address
    server.terminate()
    server.wait()


def test_the_scalar_page_shows_every_curve(page: str, tmp_path: Path) -> None:
    picture = tmp_path / "tensorboard.png"
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1600,2400",
        f"--screenshot={picture}",
        "--dump-dom",
        f"{page}/?tagFilter=^({'|'.join(CURVES)})$#timeseries",  # cards out of sight are not drawn
    ]
    # The browser's clock runs ahead of the server's answers when the machine is quick, so it gets more time.
    for budget in (60_000, 240_000, 960_000):
        shown = subprocess.run(
            [*command, f"--virtual-time-budget={budget}"], capture_output=True, text=True, timeout=300
        ).stdout
        missing = [name for name in CURVES if name not in shown]
        if not missing:
            break
    assert not missing
    colours = Image.open(picture).convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert len(colours) > 50  # a page with curves, not a blank one
