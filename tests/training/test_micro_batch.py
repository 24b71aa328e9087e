"""How many parts a batch is computed in: the numbers there are, what an image needs, what a run keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.config.train import TrainConfig
from deepvit_train.run.checkpoint import checkpoints_in
from deepvit_train.run.folder import RunFolder
from deepvit_train.training import micro_batch
from deepvit_train.training.micro_batch import _parts_before, bytes_of_an_image, possible_parts
from tests.conftest import QUICK, Command


def config(*overrides: str) -> TrainConfig:
    return compose_command("train", [*QUICK, "trainer.accumulate=auto", *overrides])


def test_a_batch_is_cut_into_equal_parts() -> None:
    assert possible_parts(config("trainer.batch_size=12"), ranks=1) == [1, 2, 3, 4, 6, 12]
    assert possible_parts(config("trainer.batch_size=12"), ranks=2) == [1, 2, 3, 6]
    assert possible_parts(config("trainer.batch_size=12", "augment.mixup=0.8"), ranks=1) == [1, 2, 3, 6]


def test_what_an_image_needs_is_what_autograd_keeps() -> None:
    """The oracle is a stack of known products: each keeps its input, and nothing else."""
    small, deep = (bytes_of_an_image(config(f"model.depth={depth}", "attn=self")) for depth in (2, 4))
    tokens, dim, hidden = 17, 16, 32
    block = 4 * tokens * (2 * dim + 3 * dim + dim + 2 * dim + 2 * hidden)  # norms, q k v, maps' output, MLP
    assert block < (deep - small) / 2 < 2.5 * block
    recomputed = bytes_of_an_image(config("model.depth=4", "attn=self", "trainer.grad_checkpointing=true"))
    assert recomputed < deep / 3


@pytest.mark.parametrize(("images", "expected"), [(100, 1), (32, 1), (31, 2), (9, 4), (1, 32)])
def test_the_fewest_parts_that_fit_are_taken(
    images: int, expected: int, call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = bytes_of_an_image(config())
    monkeypatch.setattr(micro_batch, "free_memory", lambda: 2 * need * images + 2)
    first = call("train", *QUICK, "trainer.accumulate=auto", "trainer.epochs=1", "schedule.warmup_share=null",
                 "schedule.warmup_epochs=0.5", "run_dir=run")  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert f"trainer.accumulate=auto: {expected}, with" in " ".join(first.stdout.split())
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["accumulate"] == expected
    if expected == 4:
        monkeypatch.setattr(micro_batch, "free_memory", lambda: 10**12)  # it is not found again
        again = call("train", *QUICK, "trainer.accumulate=auto", "run_dir=run", "schedule.warmup_epochs=0.5")
        assert again.returncode == 0, again.stderr
        assert "32 = 8 x 4 accumulated" in " ".join(again.stdout.split())
        assert (tmp_path / "run" / "checkpoints" / "last").readlink() == Path("step_0000012")


def test_a_run_with_the_number_that_was_found_is_the_same_run(call: Command, tmp_path: Path) -> None:
    """Looking for the number draws nothing: weights and bits are those of a run that was told it."""
    short = [*QUICK, "trainer.epochs=1", "schedule.warmup_epochs=0.5", "trainer.limit_batches=2"]
    for name, accumulate in (("found", "auto"), ("told", "1")):
        done = call("train", *short, f"trainer.accumulate={accumulate}", f"run_dir={name}")
        assert done.returncode == 0, done.stderr
    found, told = (
        (tmp_path / name / "checkpoints" / "last" / "model.safetensors").read_bytes()
        for name in ("found", "told")
    )
    assert found == told


@pytest.mark.parametrize(("ranks", "expected"), [(1, 4), (2, 2), (4, 1), (8, 1)])
def test_a_run_on_fewer_ranks_has_no_more_images_at_a_time(
    ranks: int, expected: int, tmp_path: Path, digits: Path
) -> None:
    """It began with 4 ranks of 8 images each."""
    run = config(
        "trainer.accumulate=1",
        "trainer.epochs=1",
        "schedule.warmup_epochs=0.5",
        f"run_dir={tmp_path / 'run'}",
    )
    train.run(run)
    folder = RunFolder(str(tmp_path / "run"), run.data, writes=True)
    state = checkpoints_in(folder.checkpoints)[-1] / "state.json"
    said = json.loads(state.read_text())
    said["rounding"]["ranks"] = 4
    state.write_text(json.dumps(said))
    assert _parts_before(run, folder, possible_parts(run, ranks), ranks) == expected


def test_what_never_fits_is_told(call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batch, "free_memory", lambda: 100)
    refused = call("train", *QUICK, "trainer.accumulate=auto", "run_dir=run")
    assert refused.returncode == 2
    assert "even in 32 parts; nearest: trainer.grad_checkpointing=true" in " ".join(refused.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_is_tried_until_a_step_fits() -> None:
    torch.cuda.empty_cache()
    taken: list[Tensor] = []
    found = config("trainer.batch_size=4096", "model.depth=12", "model.dim=384", "model.heads=6")
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        taken.append(torch.empty(int(total * 0.85), dtype=torch.uint8, device="cuda"))
        choices = possible_parts(found, 1)
        place = micro_batch._first_that_fits(found, choices, micro_batch.World(0, 1, torch.device("cuda")))
    finally:
        taken.clear()
    assert 0 < place < len(choices)
