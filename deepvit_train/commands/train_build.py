"""Build a run of deepvit-train: join the ranks, open data and weights, make the model, take the folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import torch

from deepvit_train.commands.train_graft import settle_graft
from deepvit_train.commands.train_job import Job, Opened
from deepvit_train.commands.train_teacher import open_teacher
from deepvit_train.config.compose import plain
from deepvit_train.config.preset import Architecture
from deepvit_train.config.train import TrainConfig
from deepvit_train.console import console
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.transform import eval_transform, train_transform
from deepvit_train.determinism import deterministic_kernels
from deepvit_train.distributed import world as distributed
from deepvit_train.distributed.agreement import together
from deepvit_train.distributed.world import World
from deepvit_train.models import DeepViT, start_from
from deepvit_train.run.change import flatten
from deepvit_train.run.elsewhere import check_installed
from deepvit_train.run.folder import RunFolder
from deepvit_train.training import images, ranks
from deepvit_train.training.class_weight import class_weights
from deepvit_train.training.interruption import StopSignals
from deepvit_train.training.micro_batch import settle_accumulate
from deepvit_train.training.optimizer import build_optimizer
from deepvit_train.training.origin import Origin, check_length, find_origin, open_splits
from deepvit_train.training.plan import build_plan
from deepvit_train.training.run import Run
from deepvit_train.training.state import build_state, is_to_be_sharded


def build(config: TrainConfig, stack: ExitStack) -> Job:
    """Join the ranks, open the data, build the model and its state, and lock the run's folder.

    Args:
        stack: what is to be given back at the end of the run is put on it.
    """
    since = time.monotonic()
    world = distributed.start(config.trainer.device.value, config.trainer.timeout_s)
    stack.callback(distributed.stop)
    ranks.check_config(world, flatten(plain(config)))
    # The default name holds that of the data's folder, which may be another path on each rank.
    config.name, config.run_dir = world.first((config.name, config.run_dir))
    stack.enter_context(deterministic_kernels(config.trainer.deterministic))
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    torch.manual_seed(config.seed)
    say = console.print if world.is_main else _say_nothing
    signals = stack.enter_context(StopSignals())

    # All that can be wrong is looked at before the folder is made: a mistake leaves no folder behind.
    folder = RunFolder(config.run_dir, config.data, writes=world.is_main)
    graft = settle_graft(config, folder, world, say)
    settle_accumulate(config, folder, world, say)
    opened = together(world, lambda: _open(config, folder, world, say))
    if graft is not None:
        graft.start_norms(opened.model)
    # The files of the embedded digits are written on each machine, by whatever Pillow is there.
    ranks.check_weights(world, opened.origin.weights)
    ranks.check_teacher(world, opened.teacher_digest)
    ranks.check_data(world, opened.labels.names, opened.splits, sizes=config.data.root is not None)

    together(world, lambda: _take(folder, config, opened.splits, stack, say))
    state = build_state(opened.model, config, opened.plan, world)
    state.class_weights = opened.class_weights
    state.teacher = opened.teacher_digest
    run = Run(
        config=config,
        world=world,
        plan=opened.plan,
        state=state,
        signals=signals,
        say=say,
        images=images.summary(opened.splits),
        since=since,
    )
    return Job(run=run, folder=folder, opened=opened)


def _open(config: TrainConfig, folder: RunFolder, world: World, say: Callable[[str], None]) -> Opened:
    """Open what a run begins with, and build its plan and model. Writes nothing.

    The checkpoint comes first, because without it nobody needs the data.
    """
    check_installed(config.tracker)
    origin = find_origin(config, folder)
    train, val, labels = open_splits(config, origin, folder, say)
    if config.data.cache:
        preprocessing = config.model.preprocessing
        varied, fixed = train_transform(preprocessing, config.augment), eval_transform(preprocessing)
        train, val = images.kept_in_memory([(train, varied), (val, fixed)], say)
    plan = build_plan(config.trainer, config.schedule, len(train), world.size)
    check_length(config, origin, plan)
    model, initial = _build_model(config, labels.names, origin, world)
    build_optimizer(model, config.optim)  # a wrong name or argument of it leaves no folder behind
    return Opened(
        splits={"train": train, config.data.evaluated: val},
        train=train,
        val=val,
        labels=labels,
        origin=origin,
        plan=plan,
        model=model,
        initial=initial,
        class_weights=class_weights(config.loss, train),
        teacher=open_teacher(config, train, say),
    )


def _take(
    folder: RunFolder,
    config: TrainConfig,
    splits: dict[str, ImageIndex],
    stack: ExitStack,
    say: Callable[[str], None],
) -> None:
    """Lock the run's folder and take over its configuration."""
    stack.enter_context(folder)
    say(f"run folder: {folder.path}")
    for line in dict.fromkeys(index.told_of_left_out() for index in splits.values()):
        if line is not None:  # one folder that was split says it once
            say(line)
    folder.adopt(plain(config), config.resume, say)


def _build_model(
    config: TrainConfig, classes: list[str], origin: Origin, world: World
) -> tuple[DeepViT, str | None]:
    """Build the model, with the initial weights that the origin names and a line that tells of them."""
    model = DeepViT(Architecture(config.model, config.attn), len(classes))
    initial = None
    if origin.weights is not None:
        initial = str(start_from(model, origin.weights, classes, config.classes, config.download))
    model.freeze(config.optim.freeze_blocks, config.optim.head_only)
    model.set_grad_checkpointing(config.trainer.grad_checkpointing)
    model.set_sync_norm(config.trainer.sync_norm)
    if not is_to_be_sharded(config, world):
        model.to(world.device)
    return model, initial


def _say_nothing(line: str) -> None:
    """Ignore a line: only the first rank prints."""
