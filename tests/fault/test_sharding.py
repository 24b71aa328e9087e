"""Spread models over two ranks: they train, are probed, save and resume as whole models do."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from deepvit_train.commands import evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import Architecture
from deepvit_train.config.train import TrainConfig
from deepvit_train.distributed import world as distributed
from deepvit_train.distributed.parallel import gathered, shard, whole
from deepvit_train.error import ConfigError, Interrupted, NotFiniteError
from deepvit_train.models import DeepViT, ReAttention
from deepvit_train.models.attention import FORMS
from deepvit_train.training import loop
from tests.conftest import QUICK, as_ranks, forked, slowly
from tests.fault.test_distributed import begin, weights
from tests.fault.test_kill import metrics, outcome

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("ranks")]  # as in test_distributed

RUN = [*QUICK, "trainer.ema_decay=0.9", "trainer.save_every_steps=3"]
SHARDED = [*RUN, "trainer.shard=true", "trainer.timeout_s=60"]


@pytest.mark.parametrize(
    "options",
    [
        # The probe looks on the first rank alone, between steps; an odd number of batches is evaluated.
        [
            "trainer.accumulate=2",
            "trainer.probe_every_steps=2",
            "trainer.eval_batch_size=40",
        ],
        pytest.param(["optim=sgd", "optim.lr=0.01"], id="sgd", marks=pytest.mark.slow),
        pytest.param(
            ["attn=reattention_vit_pytorch", "trainer.grad_checkpointing=true", "optim.freeze_blocks=1"],
            id="checkpointing",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["attn=self", "loss.cosine_weight=0.1", "model.dropout=0.1", "trainer.precision=bf16"],
            id="regulariser",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_sharded_ranks_train_as_whole_ones_do(options: list[str], digits: Path, tmp_path: Path) -> None:
    sharded, replicated = tmp_path / "sharded", tmp_path / "replicated"
    runs = (replicated, RUN), (sharded, SHARDED)
    assert as_ranks(2, *(partial(begin, folder, *run, *options) for folder, run in runs)) == 0
    for left, right in zip(metrics(replicated), metrics(sharded), strict=True):
        assert left == pytest.approx(right, rel=1e-4, abs=1e-6)
    for name, value in weights(replicated).items():
        # The gradient of the keys' bias is 0 but for rounding, and AdamW steps by its sign.
        torch.testing.assert_close(weights(sharded)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "optim",
    [
        "optim=adamw",
        *(slowly(f"optim={name}") for name in ("nadamw", "sgd", "lion")),
        slowly("optim.name=adam"),
    ],
)
def test_a_sharded_run_resumes_bit_for_bit_and_its_checkpoints_are_like_any_other(
    optim: str, digits: Path, tmp_path: Path
) -> None:
    never_stopped, stopped = tmp_path / "never-stopped", tmp_path / "stopped"
    run = [*SHARDED, "model.dropout=0.1", optim]
    starts = (never_stopped, *run), (stopped, *run, "trainer.max_steps=7"), (stopped, *run)
    assert as_ranks(2, *(partial(begin, *each) for each in starts)) == 0
    assert outcome(stopped) == outcome(never_stopped)

    # One process goes on where two stopped, and evaluates what they trained.
    assert forked(lambda: begin(stopped, *run, "trainer.epochs=3")) == 0
    last, overrides = stopped / "checkpoints" / "last", ["threads=1", "limit_batches=6", "batch_size=256"]
    report = evaluate.run(compose_command("eval", [f"checkpoint={last}", *overrides]))
    assert report["top1"] == metrics(stopped)[-1]["val_ema/top1"]


def test_each_rank_keeps_its_share_and_may_use_the_gathered_model_alone() -> None:
    def work() -> None:
        world = distributed.start("cpu", timeout_s=60)
        config = compose_command("train", ["model.depth=3", "attn=reattention_vit_pytorch"])
        assert isinstance(config, TrainConfig)
        model = DeepViT(Architecture(config.model, config.attn), 10)
        expected = {name: value.clone() for name, value in model.state_dict().items()}
        images = torch.randn(2, 3, config.model.image_size, config.model.image_size)
        logits = model.eval()(images).detach()
        shard(model, model.blocks, world)

        kept = sum(each.to_local().numel() for each in model.parameters() if isinstance(each, DTensor))
        assert 0.45 < kept / sum(value.numel() for value in expected.values()) < 0.55
        for name, value in model.state_dict().items():
            assert torch.equal(whole(value), expected[name])
        for _ in range(2):
            with gathered(model) as plain:
                if world.is_main:
                    assert torch.equal(plain(images), logits)
                    plain(images)
            assert all(each.is_meta for each in plain.parameters())
            model.train()(images).sum().backward()  # would wait for ever if the ranks' orders differed
        distributed.stop()

    assert as_ranks(2, work) == 0


def test_a_stop_in_an_evaluation_saves_the_shards_and_the_next_start_begins_with_it(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate_and_note = train.Validation.__call__

    def stopping(self: train.Validation, state: loop.TrainState) -> bool:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_and_note(self, state)

    def begin_and_stop() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(train.Validation, "__call__", stopping)
            with pytest.raises(Interrupted, match="stopped by SIGTERM"):
                begin(tmp_path / "stopped", *SHARDED)
        if os.environ["RANK"] == "0":  # which has written it by then
            state = json.loads((tmp_path / "stopped" / "checkpoints" / "last" / "state.json").read_text())
            assert (state["step"], state["evaluated_step"]) == (6, -1)

    whole, again = (partial(begin, tmp_path / name, *SHARDED) for name in ("whole", "stopped"))
    assert as_ranks(2, whole, begin_and_stop, again) == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")


class Unused(ReAttention):
    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__(architecture, index)
        self.spare = torch.nn.Parameter(torch.zeros(self.heads))


def test_replicas_refuse_and_shards_name_a_parameter_that_no_gradient_reaches(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """DDP would wait for the gradient, and end in the second step with advice for programmers."""
    monkeypatch.setitem(FORMS, "reattention", Unused)
    named = "no gradient reaches"

    def replicated() -> None:
        with pytest.raises(
            ConfigError, match=rf"{named} blocks\.0\.attn\.spare, .* \(2 parameters\); several"
        ):
            begin(tmp_path / "replicated", *RUN, "attn=reattention")

    def sharded() -> None:
        begin(tmp_path / "sharded", *SHARDED, "attn=reattention")

    assert as_ranks(2, replicated, sharded) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if named in line]
    assert lines == [f"warning: {named}: blocks.0.attn.spare, blocks.1.attn.spare (2 parameters)"]


def test_weights_that_are_not_finite_are_seen_on_every_rank(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.train_step

    def poisoned(state: loop.TrainState, *arguments: object, **named: object) -> object:
        if state.step == 4 and int(os.environ["RANK"]) == 1:
            weight = state.model.blocks[1].mlp.fc1.weight
            assert isinstance(weight, DTensor)
            weight.to_local().data.fill_(float("nan"))
        return step(state, *arguments, **named)

    def work() -> None:
        with pytest.raises(NotFiniteError, match=r"step 5: the loss is nan.*the weights themselves"):
            begin(tmp_path / "run", *SHARDED)

    monkeypatch.setattr(loop, "train_step", poisoned)
    assert as_ranks(2, work) == 0
