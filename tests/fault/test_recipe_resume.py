"""Kill runs of every optimizer, schedule and loss, on one rank and two: they end with the same bits."""

from __future__ import annotations

import os
import signal
from itertools import product
from pathlib import Path

import pytest

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.config.shipped import choices
from deepvit_train.training import loop
from tests.conftest import QUICK, as_ranks, forked
from tests.fault.test_kill import metrics, outcome

pytestmark = [pytest.mark.slow, pytest.mark.runs]

RUN = [
    *QUICK,
    "trainer.accumulate=2",
    "trainer.batch_size=16",
    "trainer.limit_batches=3",
    "trainer.save_every_steps=2",
    "trainer.log_every_steps=1",
    "trainer.calibrate_images=32",
    "trainer.eval_batch_size=32",
    "model.dropout=0.1",
    "augment=deit",
    "schedule.warmup_share=null",  # of one cycle too
    "model.drop_path=0.1",
]
KILLED_AT = 5  # a step after a save


def killed(overrides: list[str]) -> None:
    """Train until a step, and be killed after it, before anything is due."""
    step = loop.train_step

    def stepped(state: object, *rest: object, **options: object) -> object:
        result = step(state, *rest, **options)
        if state.step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    loop.train_step = stepped
    train.run(compose_command("train", overrides))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("optim", "schedule", "loss"), list(product(choices("optim"), choices("schedule"), choices("loss")))
)
def test_a_killed_run_of_each_recipe_ends_with_the_same_bits(
    digits: Path, tmp_path: Path, optim: str, schedule: str, loss: str, ranks: int
) -> None:
    run = [*RUN, f"optim={optim}", f"schedule={schedule}", f"loss={loss}", "loss.class_weight=balanced"]
    run += [] if optim == "schedulefree" else ["trainer.ema_decay=0.9"]
    check_resume(run, tmp_path, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_killed_run_that_learns_from_a_teacher_ends_with_the_same_bits(
    digits: Path, tmp_path: Path, kind: str, ranks: int
) -> None:
    teacher = [*QUICK, "trainer.epochs=1", "schedule.warmup_epochs=0.5", f"run_dir={tmp_path / 'teacher'}"]
    assert forked(lambda: train.run(compose_command("train", [*teacher, "model.image_size=24"]))) == 0
    learns = [f"distill.teacher={tmp_path / 'teacher'}", f"distill.kind={kind}", "trainer.ema_decay=0.9"]
    check_resume([*RUN, *learns], tmp_path, ranks)


def check_resume(run: list[str], tmp_path: Path, ranks: int) -> None:
    """Train a run whole, and again with a kill in its middle: bits and curves must be equal."""
    whole, folder = ([*run, f"run_dir={tmp_path / name}"] for name in ("whole", "run"))

    def finish(overrides: list[str]) -> object:
        return train.run(compose_command("train", overrides))

    if ranks == 1:
        assert forked(lambda: finish(whole)) == 0
        assert forked(lambda: killed(folder)) == -signal.SIGKILL
        assert forked(lambda: finish(folder)) == 0
    else:
        assert as_ranks(2, lambda: finish(whole)) == 0
        assert as_ranks(2, lambda: killed(folder)) == -signal.SIGKILL
        assert as_ranks(2, lambda: finish(folder)) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
