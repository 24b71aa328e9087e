"""`deepvit-train`: the life of one training run, from the seed to the last checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deepvit_train.collapse.probe import Probe
from deepvit_train.config.command import TrainConfig
from deepvit_train.config.compose import as_yaml, plain
from deepvit_train.config.preset import Architecture
from deepvit_train.config.recipe import Precision
from deepvit_train.console import console
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.dataset import Batch, TrainOrder
from deepvit_train.data.index import ImageIndex, check_classes, open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed import world as distributed
from deepvit_train.distributed.parallel import gathered, shard
from deepvit_train.distributed.world import World
from deepvit_train.evaluation.calibration import reattention_norms
from deepvit_train.evaluation.loaded import description_of
from deepvit_train.models import DeepViT, start_from
from deepvit_train.models.summary import count_flops, count_parameters
from deepvit_train.run import checkpoint
from deepvit_train.run.folder import RunFolder, describe_environment, flatten
from deepvit_train.run.saving import CheckpointWriter
from deepvit_train.run.tracking import Tracker
from deepvit_train.training.interruption import StopSignals
from deepvit_train.training.loop import Trainer, phrase
from deepvit_train.training.plan import Plan, build_plan
from deepvit_train.training.recipe import (
    build_ema,
    build_optimizer,
    build_schedule,
    describe_groups,
    is_partial,
)
from deepvit_train.training.state import TrainState
from deepvit_train.training.validation import Validation


def run(config: TrainConfig) -> dict[str, Any]:
    """Train until the plan is done. Returns the run's folder and the last evaluation's metrics.

    Raises UserError's subclasses. Before Interrupted the state is saved; after any other the last checkpoint
    stands.
    """
    with ExitStack() as stack:
        # Devices and seed.
        world = distributed.start(config.trainer.device.value, config.trainer.timeout_s)
        stack.callback(distributed.stop)
        if config.trainer.threads:
            torch.set_num_threads(config.trainer.threads)
        torch.manual_seed(config.seed)
        say = console.print if world.is_main else _silence
        signals = stack.enter_context(StopSignals())

        # Data. An explicit checkpoint is looked at first: without it there is nothing to read data for.
        source = None if config.resume in ("auto", "never") else checkpoint.find(config.resume, "last")
        train_index, val_index = (open_split(config.data, split) for split in ("train", config.data.split))
        check_classes(val_index, train_index.classes)
        plan = build_plan(config.trainer, config.schedule, len(train_index), world.size)

        # Model. Weights to start from are read before the run's folder is made: a bad file leaves none.
        model = DeepViT(Architecture(config.model, config.attn), len(train_index.classes))
        folder = RunFolder(config.run_dir, writes=world.is_main)
        fresh = config.model.weights if not (folder.begun or source) else None
        start = None if fresh is None else start_from(model, fresh)
        model.freeze(config.optim.freeze_blocks, config.optim.head_only)
        model.set_grad_checkpointing(config.trainer.grad_checkpointing)
        model.set_sync_norm(config.trainer.sync_norm)
        sharded = config.trainer.shard and world.size > 1
        if not sharded:
            model.to(world.device)

        # The run's folder.
        stack.enter_context(folder)
        say(f"run folder: {folder.path}")
        folder.adopt(plain(config), config.resume, say)
        world.barrier()

        # Optimizer, schedule, averaged weights.
        ema = build_ema(model, config.trainer.ema_decay, foreach=not sharded)
        if sharded:
            shard(model, model.blocks, world)
            if ema is not None:
                shard(ema.module, ema.module.blocks, world)
        optimizer = build_optimizer(model, config.optim)
        state = TrainState(
            model=model,
            ema=ema,
            optimizer=optimizer,
            schedule=build_schedule(optimizer, config.schedule, config.trainer.epochs, plan.steps_per_epoch),
            scaler=torch.amp.GradScaler(
                world.device.type, enabled=config.trainer.precision == Precision.fp16
            ),
        )

        # Resume: the run's own folder, before an explicit checkpoint, initial weights, a fresh start.
        origin = world.first(str(folder.newest(say) or source or ""))  # chosen by one rank for all
        if origin:
            state.restore(Path(origin))
            say(f"resumed from {origin} at step {state.step} of {plan.total_steps}")
        elif start:
            say(str(start))
        if state.step >= plan.total_steps and state.evaluated_step == state.step:
            say(f"finished already: {phrase(state.metrics)}")
            say(f"run folder: {folder.path}")
            return {"run_dir": str(folder.path), **state.metrics}

        # Loaders, and what is told at the start.
        bad = BadFiles(state.bad_files, config.data.max_bad, world, say)
        batches, validation = _loaders(config, world, plan, state, train_index, val_index, bad, signals)
        probe = _probe(config, val_index, world)
        tracker = Tracker(folder.path if world.is_main else None, state.step)
        stack.callback(tracker.close)
        folder.note_environment(describe_environment(str(world.device), torch.get_num_threads(), world.size))
        tracker.text("config", as_yaml(config), state.step)
        say(_summary(config, plan, world, state, len(train_index), len(val_index)))

        # Train, calibrate, evaluate, log, save.
        description = description_of(
            config.model,
            config.attn,
            train_index.classes,
            config.data,
            config.seed,
            config.trainer.calibrate_images if reattention_norms(model) else 0,
        )
        writer = CheckpointWriter(folder.checkpoints, config.trainer.keep_last) if world.is_main else None
        if writer is not None:
            stack.callback(writer.close)
        trainer = Trainer(
            config=config,
            world=world,
            plan=plan,
            writer=writer,
            state=state,
            validation=validation,
            bad=bad,
            probe=probe,
            tracker=tracker,
            signals=signals,
            description=description,
            say=say,
        )
        trainer.fit(batches)
        if writer is not None:
            writer.wait()

        # Close.
        result = {"run_dir": str(folder.path), **state.metrics}
        if probe is not None and probe.looks:
            say(f"attention maps: looked at {probe.looks} times, {probe.seconds:.2f} s in all")
        tracker.outcome(flatten(plain(config)), state.metrics, state.step)
        folder.write_result(result)
        say(f"done at step {state.step}: {phrase(state.metrics)}")
        say(f"watch: tensorboard --logdir {folder.path.parent}")
        say(f"run folder: {folder.path}")
        return result


def _loaders(
    config: TrainConfig,
    world: World,
    plan: Plan,
    state: TrainState,
    train_index: ImageIndex,
    val_index: ImageIndex,
    bad: BadFiles,
    signals: StopSignals,
) -> tuple[Iterator[Batch], Validation]:
    """Training batches from the state's step on, and the evaluation with its calibration images."""
    order = TrainOrder(
        len(train_index),
        batch_size=config.trainer.batch_size,
        accumulate=config.trainer.accumulate,
        steps_per_epoch=plan.steps_per_epoch,
        steps=range(state.step, plan.total_steps),
        seed=config.seed,
        repeats=config.augment.repeats,
        world=world,
    )
    loaders = Loaders(config.model.preprocessing, config.data, world)
    train = loaders.train(train_index, config.augment, order)
    batch_size, limit = config.trainer.eval_batch_size, config.trainer.limit_batches
    val = loaders.evaluation(val_index, batch_size, limit)
    calibration = None
    if config.trainer.calibrate_images and reattention_norms(state.model):
        images = config.trainer.calibrate_images
        calibration = bad.watch(loaders.calibration(train_index, images, batch_size, config.seed))
    validation = Validation(
        images=signals.watch(val, world),
        calibration_images=None if calibration is None else signals.watch(calibration, world),
        precision=config.trainer.precision,
        classes=len(train_index.classes),
        world=world,
    )
    return iter(train), validation


def _probe(config: TrainConfig, index: ImageIndex, world: World) -> Probe | None:
    """What looks at attention maps, on a fixed choice of validation images; the first rank alone."""
    if config.trainer.probe_every_steps is None or not world.is_main:
        return None
    alone, data = World(rank=0, size=1, device=world.device), replace(config.data, workers=0)
    count = config.collapse.images
    (batch,) = Loaders(config.model.preprocessing, data, alone).calibration(index, count, count, seed=0)
    return Probe(batch.images, config.collapse)


def _summary(config: TrainConfig, plan: Plan, world: World, state: TrainState, train: int, val: int) -> str:
    optim = config.optim
    with gathered(state.model) as model:
        parameters, flops = count_parameters(model), count_flops(model, config.model.image_size)
    tuned = f"\nlearning rate: {describe_groups(state.optimizer)} parameters" if is_partial(optim) else ""
    parts = f"{plan.micro_batch} x {config.trainer.accumulate} accumulated x {world.size} ranks"
    return (
        f"model: {config.attn.kind}, {config.model.depth} blocks, dim {config.model.dim}, "
        f"{config.model.heads} heads; "
        f"{parameters:,} parameters, {flops / 1e9:.3f} GFLOPs an image{tuned}\n"
        f"data: {train:,} training and {val:,} validation images in {model.num_classes} classes\n"
        f"batch: {config.trainer.batch_size} = {parts}; {plan.total_steps:,} steps, "
        f"{plan.steps_per_epoch:,} an epoch; "
        f"{config.trainer.precision} on {world.device}, {torch.get_num_threads()} threads"
    )


def _silence(line: str) -> None:
    """What ranks other than the first say."""
