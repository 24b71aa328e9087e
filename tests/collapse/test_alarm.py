"""Raise the alarm on maps that were made uniform or copied, and not on healthy models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deepvit_train.collapse.probe import Probe
from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.models import DeepViT, load_model
from deepvit_train.training.state import TrainState
from deepvit_train.training.watch import CollapseWatch

pytestmark = pytest.mark.slow  # it trains a third of the demo, with plain attention and with re-attention

WATCHED = compose_command("train", ["collapse.warn_above=0.4", "collapse.stop_above=0.4"]).collapse


@pytest.fixture(scope="module", params=["self", "reattention"])
def demo(request: pytest.FixtureRequest, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / request.param
    shorter = ["trainer.epochs=20", "trainer.eval_every_epochs=20", "trainer.threads=1"]
    train.run(compose_command("train", [f"attn={request.param}", f"run_dir={folder}", *shorter]))
    return folder


def alarmed(model: DeepViT, digits: Path) -> tuple[bool, list[str]]:
    """Whether the watch would stop a run with this model, and what it says."""
    files = [file for folder in sorted((digits / "val").iterdir()) for file in sorted(folder.iterdir())[:3]]
    names = model.class_names
    assert names is not None
    images = torch.stack([model.transform(file) for file in files])
    classes = torch.tensor([names.index(file.parent.name) for file in files])
    said: list[str] = []
    tracker: Any = SimpleNamespace(scalars=lambda *_: None, images=lambda *_: None)
    watch = CollapseWatch(Probe(images, classes, WATCHED), WATCHED, tracker, said.append, steps=100)
    stop = watch.look(cast(TrainState, SimpleNamespace(model=model, step=100)))
    return stop, said


def test_the_demo_is_healthy(demo: Path, digits: Path) -> None:
    assert alarmed(load_model(str(demo)), digits) == (False, [])


def test_deep_attention_made_uniform_raises_the_alarm(demo: Path, digits: Path) -> None:
    model = load_model(str(demo))
    with torch.no_grad():
        for block in model.blocks[2:]:
            block.attn.scale_queries_and_keys(1e-3)
            block.attn.qkv.bias[:128].zero_()
    stop, said = alarmed(model, digits)
    assert stop
    assert "of the blocks are replaceable" in said[0]


def test_blocks_that_copy_their_neighbour_raise_the_alarm(demo: Path, digits: Path) -> None:
    model, last = load_model(str(demo)), {}

    def remembering(original: Callable[[Tensor, Tensor], Tensor], copies: bool) -> Callable[..., Tensor]:
        def maps(q: Tensor, k: Tensor) -> Tensor:
            last["maps"] = last["maps"] if copies else original(q, k)
            return last["maps"]

        return maps

    for index, block in enumerate(model.blocks):
        block.attn.softmax_maps = remembering(block.attn.softmax_maps, copies=index >= 2)
    stop, _ = alarmed(model, digits)
    assert stop
