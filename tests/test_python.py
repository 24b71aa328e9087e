"""Run what docs/python.md and the README show of Python, and show that train() leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import deepvit_train
from deepvit_train.config.shipped import config_dir
from deepvit_train.error import ConfigError, DataError, Interrupted
from deepvit_train.models import DeepViT, record_maps
from deepvit_train.training import loop
from tests.conftest import QUICK, as_ranks

ROOT = Path(__file__).parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def blocks(page: str) -> list[str]:
    """The blocks of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_runs_as_it_stands(
    digits: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    image_folder.rename(tmp_path / "flowers")
    Image.open(next(digits.glob("val/3/*.png"))).save("photo.jpg")
    shown: dict[str, Any] = {}
    parts = blocks("docs/python.md")
    assert all(len(block.splitlines()) <= 16 for block in parts)
    train, load, predict, features, maps, tune = parts

    def run(block: str) -> str:
        capsys.readouterr()
        exec(block, shown)
        return capsys.readouterr().out

    assert "done at step 140" in run(train)
    assert shown["result"] == json.loads(Path("runs/first/result.json").read_text())

    run(load)
    model: DeepViT = shown["model"]
    assert model.class_names == sorted(entry.name for entry in digits.glob("val/*"))
    assert (model.preprocessing.image_size, model.training) == (16, False)

    said = run(predict).splitlines()
    image = shown["image"]
    assert torch.equal(image, model.transform(Image.open("photo.jpg")))
    with torch.no_grad():
        logits = model(image[None])
    best = logits[0].argsort(descending=True)[:3].tolist()
    assert [line.partition(":")[0] for line in said] == [model.class_names[output] for output in best]
    assert shown["shares"].sum().item() == pytest.approx(1)

    run(features)
    assert torch.equal(shown["tokens"], model.forward_features(image[None]))
    assert torch.equal(model.head(shown["features"]), logits)
    assert shown["features"].shape == (1, model.num_features)

    said = run(maps).splitlines()
    records = list(record_maps(model, image[None]))
    assert [line.partition(",")[0] for line in said] == ["block 0: (1", "block 1: (1"]
    assert torch.equal(shown["weights"], records[-1].before[0, :, 0, 1:].mean(dim=0))

    before = model.blocks[0].attn.norm.running_mean.clone()
    run(tune)
    assert model.class_names == ["ant", "bee", "cat"]
    assert (model(image[None]).shape, model.training) == ((1, 3), False)
    assert not torch.equal(before, model.blocks[0].attn.norm.running_mean)

    readme = (ROOT / "README.md").read_text().partition("## From Python\n")[2].partition("\n## ")[0]
    lines = [line.removeprefix("    ") for line in readme.splitlines() if line.startswith("    ")]
    first = [line for line in lines if "runs/NAME" in line or "photo.jpg" in line]
    assert len(first) == 2
    assert run("\n".join(lines).replace("runs/NAME", "runs/first"))


def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, deepvit_train; assert {'load_model', 'train'} <= set(dir(deepvit_train));"
        "assert not {'torch', 'hydra', 'rich'} & set(sys.modules);"
        "deepvit_train.load_model; assert 'torch' in sys.modules and 'hydra' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert deepvit_train.load_model is sys.modules["deepvit_train.models"].load_model
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        deepvit_train.trian  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]


def process_state() -> dict[str, Any]:
    """What a run changes in its process."""
    return {
        "handlers": [signal.getsignal(number) for number in SIGNALS],
        "threads": torch.get_num_threads(),
        "torch": torch.get_rng_state().tolist(),
        "running": [*threading.enumerate(), *multiprocessing.active_children()],
        "group": torch.distributed.is_initialized(),
        "hydra": GlobalHydra.instance().hydra,
        "files": open_files(),
    }


def settled(expected: dict[str, Any]) -> dict[str, Any]:
    """The state of the process, once threads that were told to end have had time to."""
    deadline = time.monotonic() + 20
    while process_state() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return process_state()


def open_files() -> list[str]:
    """The files under pytest's temporary folder that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself is closed by now
            found.append(str(link.readlink()))
    return sorted(file for file in found if "/pytest-of-" in file)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_trains_in_a_notebook_and_leaves_nothing_behind(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    keys = [*QUICK, f"run_dir={tmp_path / 'run'}", f"data.workers={workers}"]
    torch.set_num_threads(2)
    results: list[dict[str, Any]] = []

    async def cell() -> None:
        before = process_state()
        results.append(deepvit_train.train(*keys))
        assert settled(before) == before
        results.append(deepvit_train.train(*keys))  # a finished run
        with pytest.raises(ConfigError, match=r"did you mean 'model\.depth'"):
            deepvit_train.train("model.dept=2")
        with pytest.raises(DataError, match="no such folder"):
            deepvit_train.train(f"data.root={tmp_path / 'none'}")
        with pytest.raises(ConfigError, match="-m: not of the form key=value"):
            deepvit_train.train("-m", "seed=0,1")
        assert settled(before) == before
        monkeypatch.setattr(loop, "train_step", stopping)
        with pytest.raises(Interrupted, match="SIGINT; saved") as error:
            deepvit_train.train(*keys, "trainer.epochs=3")
        assert error.value.exit_code == 130
        assert settled(before) == before
        # A program that uses Hydra itself, and a thread, which may take no signals.
        monkeypatch.setattr(loop, "train_step", step)
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            outer = GlobalHydra.instance().hydra
            results.append(await asyncio.to_thread(deepvit_train.train, *keys, "trainer.epochs=3"))
            assert GlobalHydra.instance().hydra is outer

    step = loop.train_step

    def stopping(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments, **named)

    try:
        asyncio.run(cell())
    finally:
        torch.set_num_threads(1)
    assert results[0] == results[1]
    assert results[2] == json.loads((tmp_path / "run" / "result.json").read_text())
    assert results[2]["val/loss"] != results[0]["val/loss"]


def test_ranks_part_afterwards(digits: Path, tmp_path: Path) -> None:
    def train() -> None:
        deepvit_train.train(*QUICK, f"run_dir={tmp_path / 'run'}")
        assert not torch.distributed.is_initialized()

    assert as_ranks(2, train, train) == 0  # the second time it is finished
