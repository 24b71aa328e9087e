"""The splits of a data set as loaders: training images in order of steps, evaluation, calibration."""

from __future__ import annotations

import os

import numpy as np

from deepvit_train.config.data import AugmentConfig, DataConfig
from deepvit_train.config.model import ModelConfig
from deepvit_train.data.dataset import EvalOrder, ImageDataset, TrainOrder
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.loader import Loader, LoaderOptions
from deepvit_train.data.transform import eval_transform, train_transform
from deepvit_train.determinism import derive_seed, permutation
from deepvit_train.distributed.world import World


def train_loader(
    index: ImageIndex,
    model: ModelConfig,
    augment: AugmentConfig,
    data: DataConfig,
    order: TrainOrder,
    world: World,
) -> Loader:
    """Training images in the given order, each varied by draws from the order's seed."""
    dataset = ImageDataset(index, train_transform(model, augment), order.seed, limits(data), data.max_bad)
    return Loader(dataset, order, loader_options(data, world), model.mean, model.std)


def eval_loader(
    index: ImageIndex,
    model: ModelConfig,
    data: DataConfig,
    batch_size: int,
    world: World,
    limit_batches: int | None = None,
) -> Loader:
    """Every image of a split once, over all ranks; or the first batches only. No image is replaced."""
    dataset = ImageDataset(index, eval_transform(model), seed=0, limits=limits(data), replacements=0)
    order = EvalOrder(np.arange(len(index)), batch_size, world.rank, world.size, limit_batches)
    return Loader(dataset, order, loader_options(data, world), model.mean, model.std)


def calibration_loader(
    index: ImageIndex,
    model: ModelConfig,
    data: DataConfig,
    images: int,
    batch_size: int,
    seed: int,
    world: World,
) -> Loader:
    """A fixed choice of training images, drawn over all classes, as they are seen in evaluation."""
    dataset = ImageDataset(index, eval_transform(model), seed, limits(data), data.max_bad)
    chosen = permutation(len(index), derive_seed("calibration", seed))[:images]
    order = EvalOrder(chosen, batch_size, world.rank, world.size)
    return Loader(dataset, order, loader_options(data, world), model.mean, model.std)


def loader_options(data: DataConfig, world: World) -> LoaderOptions:
    """Loader processes of this rank: as asked for, or this machine's cores shared by its ranks."""
    workers = data.workers
    if workers is None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(16, max(1, len(os.sched_getaffinity(0)) // ranks_here))
    return LoaderOptions(workers, world.device)


def limits(data: DataConfig) -> Limits:
    """What a file may demand."""
    return Limits(max_bytes=data.max_bytes, max_pixels=data.max_pixels)
