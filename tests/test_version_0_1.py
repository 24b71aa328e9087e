"""Read what version 0.1.0 wrote: it gives the figures that it gave then, and can be continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Command

FIXTURES = Path(__file__).parent / "fixtures"

# The run's command, as it was typed.
COMMAND = (  # noqa: SIM905
    "attn=reattention model.depth=2 model.dim=16 model.heads=2 trainer.threads=1 trainer.batch_size=32 "
    "trainer.epochs=4 trainer.limit_batches=6 trainer.calibrate_images=64 trainer.ema_decay=0.9 "
    "trainer.eval_every_epochs=1 trainer.keep_last=1 schedule.warmup_epochs=1 data.workers=0"
).split()


def test_a_run_evaluates_to_the_same_figures(call: Command) -> None:
    shutil.copytree(FIXTURES / "run_of_0_1", "old", symlinks=True)
    result = json.loads(call("eval", "checkpoint=old").stdout.splitlines()[-1])
    assert (result["weights"], result["images"]) == ("ema", 364)
    assert result["top1"] == pytest.approx(0.10164835164835165)
    assert result["loss"] == pytest.approx(2.305798876416552, rel=1e-6)


def test_a_run_goes_on(call: Command) -> None:
    shutil.copytree(FIXTURES / "run_of_0_1", "old", symlinks=True)
    said = call("train", *COMMAND, "run_dir=old")
    assert "step 12" in said.stdout
    result = json.loads(Path("old/result.json").read_text())
    assert result["val/loss"] == pytest.approx(2.302712702489161, rel=1e-5)
    assert result["val_ema/loss"] == pytest.approx(2.3033722259186127, rel=1e-5)


def test_a_weights_file_evaluates_to_the_same_figures(call: Command) -> None:
    shutil.copy(FIXTURES / "weights_of_0_1.safetensors", "old.safetensors")
    result = json.loads(call("eval", "checkpoint=old.safetensors").stdout.splitlines()[-1])
    assert result["top1"] == pytest.approx(0.09340659340659341)
    assert result["loss"] == pytest.approx(2.3414496117895776, rel=1e-6)
