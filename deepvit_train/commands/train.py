"""`deepvit-train`: the life of one training run, from the seed to the last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepvit_train.collapse.probe import Probe
from deepvit_train.config.compose import as_yaml, plain
from deepvit_train.config.preset import Architecture
from deepvit_train.config.train import TrainConfig
from deepvit_train.console import console
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.dataset import Batch, TrainOrder
from deepvit_train.data.index import ImageIndex, check_classes, open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed import world as distributed
from deepvit_train.distributed.parallel import gathered
from deepvit_train.distributed.world import World
from deepvit_train.evaluation.calibration import reattention_norms
from deepvit_train.models import DeepViT, start_from
from deepvit_train.models.summary import count_flops, count_parameters
from deepvit_train.run.description import ModelDescription
from deepvit_train.run.folder import RunFolder, describe_environment, flatten
from deepvit_train.run.saving import CheckpointWriter
from deepvit_train.run.tracking import Tracker
from deepvit_train.training.interruption import StopSignals
from deepvit_train.training.loop import Run, Trainer, phrase
from deepvit_train.training.origin import Origin, find_origin, resume
from deepvit_train.training.plan import build_plan
from deepvit_train.training.recipe import describe_groups, is_partial
from deepvit_train.training.state import build_state, is_to_be_sharded
from deepvit_train.training.validation import Validation
from deepvit_train.training.watch import CollapseWatch


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A run that was built, with its folder, its data, and where its weights come from."""

    run: Run
    train: ImageIndex
    val: ImageIndex
    folder: RunFolder
    origin: Origin
    initial: str | None  # a line on the initial weights that were loaded

    @property
    def calibrate_images(self) -> int:
        """How many training images to calibrate on; 0 if the model has nothing to calibrate."""
        needed = bool(reattention_norms(self.run.state.model))
        return self.run.config.trainer.calibrate_images if needed else 0


def run(config: TrainConfig) -> dict[str, Any]:
    """Train until the plan is done. Returns the run's folder and the metrics of the last evaluation.

    Raises UserError's subclasses. Before Interrupted the state is saved. After any other error the last
    checkpoint stands.
    """
    with ExitStack() as stack:
        job = _build(config, stack)
        _resume(job)
        if job.run.finished:
            job.run.say(f"finished already: {phrase(job.run.state.metrics)}")
            job.run.say(f"run folder: {job.folder.path}")
            return _result(job)
        trainer = _fit(job, stack)
        return _report(job, trainer)


def _build(config: TrainConfig, stack: ExitStack) -> _Job:
    """Join the ranks, open the data, build the model and its state, and lock the run's folder."""
    world = distributed.start(config.trainer.device.value, config.trainer.timeout_s)
    stack.callback(distributed.stop)
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.seed)
    say = console.print if world.is_main else _say_nothing
    signals = stack.enter_context(StopSignals())

    # All that can be wrong is looked at before the folder is made: a mistake leaves no folder behind. The
    # checkpoint comes first, because without it nobody needs the data.
    folder = RunFolder(config.run_dir, writes=world.is_main)
    origin = find_origin(config, folder)
    train, val = (open_split(config.data, split) for split in ("train", config.data.split))
    check_classes(val, train.classes)
    plan = build_plan(config.trainer, config.schedule, len(train), world.size)
    model, initial = _build_model(config, len(train.classes), origin, world)

    stack.enter_context(folder)
    say(f"run folder: {folder.path}")
    folder.adopt(plain(config), config.resume, say)
    world.barrier()
    state = build_state(model, config, plan, world)
    run = Run(config=config, world=world, plan=plan, state=state, signals=signals, say=say)
    return _Job(run=run, train=train, val=val, folder=folder, origin=origin, initial=initial)


def _build_model(
    config: TrainConfig, classes: int, origin: Origin, world: World
) -> tuple[DeepViT, str | None]:
    """Build the model, with the initial weights that the origin names and a line that tells of them."""
    model = DeepViT(Architecture(config.model, config.attn), classes)
    initial = None if origin.weights is None else str(start_from(model, origin.weights))
    model.freeze(config.optim.freeze_blocks, config.optim.head_only)
    model.set_grad_checkpointing(config.trainer.grad_checkpointing)
    model.set_sync_norm(config.trainer.sync_norm)
    if not is_to_be_sharded(config, world):
        model.to(world.device)
    return model, initial


def _resume(job: _Job) -> None:
    """Go on from a checkpoint, if there is one."""
    state, say = job.run.state, job.run.say
    checkpoint = resume(state, job.origin, job.folder, job.train, job.run.world, say)
    if checkpoint is not None:
        say(f"resumed from {checkpoint} at step {state.step} of {job.run.plan.total_steps}")
    elif job.initial is not None:
        say(job.initial)


def _fit(job: _Job, stack: ExitStack) -> Trainer:
    """Train to the plan's end: log, calibrate, evaluate, save."""
    config, world, state, folder = job.run.config, job.run.world, job.run.state, job.folder
    bad = BadFiles(state.bad_files, config.data.max_bad, world, job.run.say)
    loaders = Loaders(config.model.preprocessing, config.data, world)
    batches = _training_batches(job, loaders)
    validation = _validation(job, loaders, bad)
    probe = _probe(job)
    tracker = Tracker(folder.path if world.is_main else None, state.step)
    stack.callback(tracker.close)
    folder.note_environment(describe_environment(str(world.device), torch.get_num_threads(), world.size))
    tracker.text("config", as_yaml(config), state.step)
    job.run.say(_summary(job))

    description = ModelDescription(
        architecture=Architecture(config.model, config.attn),
        classes=job.train.classes,
        data=config.data.name,
        seed=config.seed,
        calibrate_images=job.calibrate_images,
    )
    writer = CheckpointWriter(folder.checkpoints, config.trainer.keep_last) if world.is_main else None
    if writer is not None:
        stack.callback(writer.close)
    trainer = Trainer(
        run=job.run,
        validation=validation,
        bad=bad,
        watch=CollapseWatch(probe, config.collapse, tracker, job.run.say),
        tracker=tracker,
        writer=writer,
        description=description,
    )
    trainer.fit(batches)
    if writer is not None:
        writer.wait()
    return trainer


def _report(job: _Job, trainer: Trainer) -> dict[str, Any]:
    """Log the outcome, write result.json, and say how the run ended."""
    state, say, result = job.run.state, job.run.say, _result(job)
    if (probe := trainer.watch.probe) is not None and probe.looks:
        say(f"attention maps: looked at {probe.looks} times, {probe.seconds:.2f} s in all")
    trainer.tracker.outcome(flatten(plain(job.run.config)), state.metrics, state.step)
    job.folder.write_result(result)
    say(f"done at step {state.step}: {phrase(state.metrics)}")
    say(f"watch: tensorboard --logdir {job.folder.path.parent}")
    say(f"run folder: {job.folder.path}")
    return result


def _result(job: _Job) -> dict[str, Any]:
    return {"run_dir": str(job.folder.path), **job.run.state.metrics}


def _training_batches(job: _Job, loaders: Loaders) -> Iterator[Batch]:
    """Return the training batches from the state's step on."""
    config, plan = job.run.config, job.run.plan
    order = TrainOrder(
        len(job.train),
        batch_size=config.trainer.batch_size,
        accumulate=config.trainer.accumulate,
        steps_per_epoch=plan.steps_per_epoch,
        steps=range(job.run.state.step, plan.total_steps),
        seed=config.seed,
        repeats=config.augment.repeats,
        world=job.run.world,
    )
    return iter(loaders.train(job.train, config.augment, order))


def _validation(job: _Job, loaders: Loaders, bad: BadFiles) -> Validation:
    """Build the evaluation of a state, with the training images to calibrate on."""
    config, world = job.run.config, job.run.world
    batch_size = config.trainer.eval_batch_size
    images = loaders.evaluation(job.val, batch_size, config.trainer.limit_batches)
    calibration = None
    if job.calibrate_images:
        chosen = loaders.calibration(job.train, job.calibrate_images, batch_size, config.seed)
        calibration = job.run.signals.watch(bad.watch(chosen), world)
    return Validation(
        images=job.run.signals.watch(images, world),
        calibration_images=calibration,
        precision=config.trainer.precision,
        classes=len(job.train.classes),
        world=world,
    )


def _probe(job: _Job) -> Probe | None:
    """Build what looks at attention maps, on a fixed choice of validation images. Only rank 0 has one."""
    config, world = job.run.config, job.run.world
    if config.trainer.probe_every_steps is None or not world.is_main:
        return None
    alone, data = World(rank=0, size=1, device=world.device), replace(config.data, workers=0)
    count = config.collapse.images
    (batch,) = Loaders(config.model.preprocessing, data, alone).calibration(job.val, count, count, seed=0)
    return Probe(batch.images, config.collapse)


def _summary(job: _Job) -> str:
    """Describe the model, the data, the batches and a shortened warm-up, in a line each."""
    config, plan, world = job.run.config, job.run.plan, job.run.world
    with gathered(job.run.state.model) as model:
        parameters, flops = count_parameters(model), count_flops(model, config.model.image_size)
    groups = describe_groups(job.run.state.optimizer)
    tuned = f"\nlearning rate: {groups} parameters" if is_partial(config.optim) else ""
    parts = f"{plan.micro_batch} x {config.trainer.accumulate} accumulated x {world.size} ranks"
    warmup, wanted = config.schedule.warmup_within(config.trainer.epochs), config.schedule.warmup_epochs
    short = f"\nwarm-up: {warmup:g} epochs, half of the run, because {wanted:g} leave nothing of it"
    return (
        f"model: {config.attn.kind}, {config.model.depth} blocks, dim {config.model.dim}, "
        f"{config.model.heads} heads; "
        f"{parameters:,} parameters, {flops / 1e9:.3f} GFLOPs an image{tuned}\n"
        f"data: {len(job.train):,} training and {len(job.val):,} validation images in "
        f"{model.num_classes} classes\n"
        f"batch: {config.trainer.batch_size} = {parts}; {plan.total_steps:,} steps, "
        f"{plan.steps_per_epoch:,} an epoch; "
        f"{config.trainer.precision} on {world.device}, {torch.get_num_threads()} threads"
        f"{short * (warmup != wanted)}"
    )


def _say_nothing(line: str) -> None:
    """Ignore a line: only the first rank prints."""
