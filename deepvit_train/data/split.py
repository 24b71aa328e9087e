"""The splits of a data set as loaders: training images in order of steps, evaluation, calibration."""

from __future__ import annotations

import os
from itertools import islice

from torch.utils.data import DataLoader

from deepvit_train.data.dataset import ImageDataset, LoaderOptions, TrainOrder, build_loader, eval_batches
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.transform import Transform
from deepvit_train.determinism import derive_seed, permutation
from deepvit_train.distributed import World


def loader_options(workers: int | None, world: World) -> LoaderOptions:
    """Loader processes of this rank: as asked for, or this machine's cores shared by its ranks."""
    if workers is None:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        workers = min(16, max(1, len(os.sched_getaffinity(0)) // ranks_here))
    return LoaderOptions(workers, pin_memory=world.device.type == "cuda")


def train_loader(
    index: ImageIndex, transform: Transform, order: TrainOrder, seed: int, options: LoaderOptions
) -> DataLoader:
    """Training images in the given order."""
    return build_loader(ImageDataset(index, transform, seed), order, options)


def eval_loader(
    index: ImageIndex,
    transform: Transform,
    batch_size: int,
    world: World,
    options: LoaderOptions,
    limit_batches: int | None = None,
) -> DataLoader:
    """Every image of a split once, over all ranks; or the first batches only."""
    batches = eval_batches(range(len(index)), batch_size, world.rank, world.size)
    return build_loader(ImageDataset(index, transform, seed=0), list(islice(batches, limit_batches)), options)


def calibration_loader(
    index: ImageIndex,
    transform: Transform,
    images: int,
    batch_size: int,
    seed: int,
    world: World,
    options: LoaderOptions,
) -> DataLoader:
    """A fixed choice of training images, drawn over all classes, as they are seen in evaluation."""
    chosen = permutation(len(index), derive_seed("calibration", seed))[:images].tolist()
    batches = eval_batches(chosen, batch_size, world.rank, world.size)
    return build_loader(ImageDataset(index, transform, seed), batches, options)
