"""`deepvit-train`: the life of one training run, from the seed to the last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepvit_train.collapse.probe import Probe
from deepvit_train.commands.train_build import build
from deepvit_train.commands.train_job import Job
from deepvit_train.commands.train_report import report, rest, result_of, tell_where
from deepvit_train.commands.train_resume import go_on
from deepvit_train.commands.train_summary import summary
from deepvit_train.commands.train_teacher import place_teacher
from deepvit_train.config.compose import as_yaml, plain
from deepvit_train.config.data import Balance
from deepvit_train.config.preset import Architecture
from deepvit_train.config.train import TrainConfig
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.balance import BalancedOrder
from deepvit_train.data.dataset import Batch
from deepvit_train.data.loaders import Loaders
from deepvit_train.data.order import TrainOrder
from deepvit_train.data.patience import Patience
from deepvit_train.distributed.world import World
from deepvit_train.run.change import flatten
from deepvit_train.run.description import ModelDescription
from deepvit_train.run.environment import describe_environment, describe_rounding, describe_source
from deepvit_train.run.identity import build_identity
from deepvit_train.run.saving import CheckpointWriter
from deepvit_train.run.tracking import Tracker
from deepvit_train.training.loop import Trainer
from deepvit_train.training.saver import Saver
from deepvit_train.training.validation import Validation, phrase
from deepvit_train.training.watch import CollapseWatch


def run(config: TrainConfig) -> dict[str, Any]:
    """Train until the plan is done. Returns the run's folder and the metrics of the last evaluation.

    Raises UserError's subclasses. Before Interrupted the state is saved. After any other error the last
    checkpoint stands.
    """
    with ExitStack() as stack:
        job = build(config, stack)
        resumed = go_on(job)
        if job.run.finished:
            job.run.say(f"finished already: {phrase(job.run.state.metrics, job.labels.present)}")
            tell_where(job)
            return result_of(job)
        lines = summary(job.run, job.train, job.val)
        lines += [] if job.opened.teacher is None else [job.opened.teacher.told]
        trainer = _fit(job, resumed, lines, stack)
        if not job.run.finished:
            return rest(job)
        return report(job, trainer.watch, trainer.tracker, lines)


def _fit(job: Job, resumed: Path | None, lines: list[str], stack: ExitStack) -> Trainer:
    """Train to the plan's end: log, calibrate, evaluate, save.

    Args:
        resumed: the checkpoint to go on from.
        lines: what is said of the run before its first step.
    """
    config, world, state, folder = job.run.config, job.run.world, job.run.state, job.folder
    bad = BadFiles(state.bad_files, config.data.max_bad, world, job.run.say)
    patience = Patience(lambda: job.run.signals.stop, job.run.say)
    loaders = Loaders(config.model.preprocessing, config.data, world, patience)
    batches = _training_batches(job, loaders)
    validation = _validation(job, loaders, bad)
    probe = _probe(job, patience)
    tracker = Tracker(
        folder.path if world.is_main else None,
        state.step,
        evaluated=state.evaluated_step == state.step,
        check=folder.check_held,
        others=config.tracker,
        run=folder.run,
        say=job.run.say,
    )
    stack.callback(tracker.close)
    folder.note_environment(describe_environment(world.device, world.size))
    tracker.text("config", as_yaml(config), state.step)
    tracker.configuration(flatten(plain(config)))
    for line in lines:
        job.run.say(line)

    distillation = place_teacher(job, loaders)
    saver = _saver(job, resumed, stack)
    trainer = Trainer(
        run=job.run,
        validation=validation,
        bad=bad,
        watch=CollapseWatch(probe, config.collapse, tracker, job.run.say, job.run.plan.total_steps),
        tracker=tracker,
        saver=saver,
        distillation=distillation,
    )
    trainer.fit(batches)
    saver.wait()
    tracker.raise_failure()
    return trainer


def _saver(job: Job, resumed: Path | None, stack: ExitStack) -> Saver:
    """Build what writes checkpoints, with the description of the model that they carry."""
    config, folder = job.run.config, job.folder
    description = ModelDescription(
        architecture=Architecture(config.model, config.attn),
        classes=job.train.classes,
        data=config.data.name,
        seed=config.seed,
        calibrate_images=job.calibrate_images,
        value_range=config.data.value_range,
    )
    writer = None
    if job.run.world.is_main:
        writer = CheckpointWriter(folder.checkpoints, config.trainer.keep_last, folder.check_held)
        stack.callback(writer.close)
    return Saver(
        state=job.run.state,
        header=description.header(),
        data=config.data,
        about=_about(job),
        writer=writer,
        keep_config=folder.keep_config,
        saved_step=job.run.state.step if job.is_here(resumed) else -1,
    )


def _about(job: Job) -> dict[str, Any]:
    """Return what a checkpoint says of the run, beside the state of its training."""
    world = job.run.world
    identity = build_identity(job.folder.run, plain(job.run.config), job.labels.names)
    return {
        "images": job.run.images,
        "identity": identity.plain(),
        "rounding": describe_rounding(world.device, world.size),
        "source": describe_source(),
    }


def _training_batches(job: Job, loaders: Loaders) -> Iterator[Batch]:
    """Return the training batches from the state's step on."""
    config, plan, balance = job.run.config, job.run.plan, job.run.config.data.balance
    order = TrainOrder(
        len(job.train),
        batch_size=config.trainer.batch_size,
        accumulate=config.trainer.parts,
        steps_per_epoch=plan.steps_per_epoch,
        steps=range(job.run.state.step, plan.total_steps),
        seed=config.seed,
        repeats=config.augment.repeats,
        balanced=None if balance == Balance.none else BalancedOrder(job.train.targets, balance),
        world=job.run.world,
        mirrored=bool(config.augment.mixup or config.augment.cutmix),
    )
    if job.run.world.size == 1:  # several ranks save between two steps only
        loaders = replace(loaders, patience=replace(loaders.patience, interrupts=job.run.signals.asked))
    return iter(loaders.train(job.train, config.augment, order))


def _validation(job: Job, loaders: Loaders, bad: BadFiles) -> Validation:
    """Build the evaluation of a state, with the training images to calibrate on."""
    config, world = job.run.config, job.run.world
    batch_size = config.trainer.eval_batch_size
    batches = loaders.evaluation(job.val, batch_size, config.trainer.limit_batches)
    calibration = None
    if job.calibrate_images:
        chosen = loaders.calibration(job.train, job.calibrate_images, batch_size, config.seed)
        calibration = job.run.signals.watch(bad.watch(chosen), world)
    return Validation(
        images=job.run.signals.watch(batches, world),
        calibration_images=calibration,
        precision=config.trainer.precision,
        classes=len(job.train.classes),
        total=len(job.val),
        world=world,
        absent=job.labels.absent,
        select_by=config.trainer.select_by,
    )


def _probe(job: Job, patience: Patience) -> Probe | None:
    """Build what looks at attention maps, on a fixed choice of validation images. Only rank 0 has one."""
    config, world = job.run.config, job.run.world
    if config.trainer.probe_every_steps is None or not world.is_main:
        return None
    alone, data = World(rank=0, size=1, device=world.device), replace(config.data, workers=0)
    count = config.collapse.images
    loaders = Loaders(config.model.preprocessing, data, alone, patience)
    (batch,) = loaders.calibration(job.val, count, count, seed=0)
    return Probe(batch.images, batch.targets, config.collapse)
