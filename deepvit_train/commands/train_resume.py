"""How deepvit-train goes on from a checkpoint: what is checked, mended and said before the first step."""

from __future__ import annotations

import math
from pathlib import Path

from deepvit_train.commands.train_job import Job
from deepvit_train.console import amount
from deepvit_train.distributed.agreement import together
from deepvit_train.error import CheckpointError
from deepvit_train.run.checkpoint import read_state
from deepvit_train.run.environment import describe_rounding, describe_source, told_of_rounding, told_of_source
from deepvit_train.run.identity import check_classes
from deepvit_train.run.saving import finish_save
from deepvit_train.training import images
from deepvit_train.training.origin import resume
from deepvit_train.training.schedule import learning_rate_after


def go_on(job: Job) -> Path | None:
    """Go on from a checkpoint, if there is one, and return it."""
    state, plan, say, world = job.run.state, job.run.plan, job.run.say, job.run.world
    checkpoint = resume(state, job.opened.origin, job.folder, world, say)
    if checkpoint is not None:
        together(world, lambda: _check(job, checkpoint))
        if not job.is_here(checkpoint):
            state.best, state.worse, state.hours = {}, 0, 0.0  # it was another run's
        say(f"resumed from {checkpoint} at step {state.step} of {plan.total_steps}")
        _tell_changes(job, checkpoint)
    elif job.opened.initial is not None:
        say(job.opened.initial)
    together(world, lambda: _settle(job, checkpoint))
    return checkpoint


def _settle(job: Job, checkpoint: Path | None) -> None:
    """Mend what a kill left unfinished in the run's folder, and keep the paths of the images there."""
    if job.run.world.is_main:
        if checkpoint is not None and job.is_here(checkpoint):
            finish_save(checkpoint, job.run.state.best)
        images.keep(job.folder.path, job.opened.splits)


def _check(job: Job, checkpoint: Path) -> None:
    """Raise CheckpointError or DataError where a checkpoint is of other classes or images than the run's.

    A run that goes on here has images in common with before. Another run's checkpoint may have seen others.
    """
    said = read_state(checkpoint)
    check_classes(checkpoint, said, job.labels.names)
    if job.is_here(checkpoint) and said.get("teacher") != job.run.state.teacher:
        raise CheckpointError(
            f"distill.teacher={job.run.config.distill.teacher}: is not the model that this run learns from, "
            "whose weights were others; nearest: the file that the run began with, or another name="
        )
    if job.is_here(checkpoint) and job.run.config.data.root is not None:
        images.check_others(job.folder.path, said.get("images", {}), job.train)


def _tell_changes(job: Job, checkpoint: Path) -> None:
    """Say what differs from the run that wrote the checkpoint: images, rounding and the learning rate."""
    state, plan, say, world = job.run.state, job.run.plan, job.run.say, job.run.world
    if world.is_main:
        said = read_state(checkpoint)
        for line in images.changes(
            checkpoint.resolve().parent.parent, said.get("images", {}), job.opened.splits
        ):
            say(line)
        if line := told_of_rounding(said.get("rounding", {}), describe_rounding(world.device, world.size)):
            say(f"since step {state.step}: {line}")
        if line := told_of_source(said.get("source", {}), describe_source()):
            say(f"since step {state.step}: {line}")
        if said.get("class_weights", state.class_weights) != state.class_weights:
            say("the weights of classes in the loss changed: other images, or another loss.class_weight file")
    rate, epochs = learning_rate_after(state.schedule, state.step), job.run.config.trainer.epochs
    if state.saved_rate is not None and not math.isclose(rate, state.saved_rate, rel_tol=1e-6):
        say(
            f"the learning rate at step {state.step} changes from {state.saved_rate:.3e} to {rate:.3e}: "
            f"the schedule spans {amount(epochs, 'epoch')} of {amount(plan.steps_per_epoch, 'step')} now"
        )
