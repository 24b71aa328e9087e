"""The splits of a data set as loaders: training images in order of steps, evaluation, calibration."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from deepvit_train.config.data import AugmentConfig, DataConfig
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.data.choice import spread_over_classes
from deepvit_train.data.corruption import CorruptedTransform, corruption_seed
from deepvit_train.data.dataset import ImageDataset
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.loader import Loader, LoaderOptions
from deepvit_train.data.order import EvalOrder, TrainOrder
from deepvit_train.data.patience import Patience
from deepvit_train.data.transform import eval_transform, train_transform
from deepvit_train.data.unlabelled import UnlabelledDataset
from deepvit_train.determinism import derive_seed, permutation
from deepvit_train.distributed.launch import local_size
from deepvit_train.distributed.world import World


@dataclass(frozen=True)
class Loaders:
    """Builds every loader of one model: its images, where they are, and the rank that reads them.

    `patience` says who may interrupt a wait for them, and who is told of it.
    """

    preprocessing: Preprocessing
    data: DataConfig
    world: World
    patience: Patience = field(default_factory=Patience)

    def train(self, index: ImageIndex, augment: AugmentConfig, order: TrainOrder) -> Loader:
        """Load training images in the given order, each varied by draws from the order's seed."""
        transform = train_transform(self.preprocessing, augment)
        # One more than may be bad: also the one that ends the run is replaced, so that its state is sound.
        replacements = self.data.max_bad + 1
        dataset = ImageDataset(index, transform, order.seed, limits(self.data), replacements)
        return self._load(dataset, order)

    def evaluation(self, index: ImageIndex, batch_size: int, limit_batches: int | None = None) -> Loader:
        """Load every image of a split once, over all ranks. None is replaced.

        Args:
            limit_batches: load so many batches on each rank only, spread over the classes.
        """
        transform = eval_transform(self.preprocessing)
        dataset = ImageDataset(index, transform, seed=0, limits=limits(self.data), replacements=0)
        return self._load(dataset, self.evaluation_order(index, batch_size, limit_batches))

    def evaluation_order(
        self, index: ImageIndex, batch_size: int, limit_batches: int | None = None
    ) -> EvalOrder:
        """Return which images each batch of `evaluation` holds on this rank."""
        chosen = np.arange(len(index))
        if limit_batches is not None and limit_batches * batch_size * self.world.size < len(index):
            chosen = spread_over_classes(index.targets, limit_batches * batch_size * self.world.size)
        return EvalOrder(chosen, batch_size, self.world)

    def prediction(self, index: ImageIndex, batch_size: int, limit_batches: int | None = None) -> Loader:
        """Load the images that `evaluation` loads. Targets are the images' numbers, or unlabelled.BAD."""
        transform = eval_transform(self.preprocessing)
        dataset = UnlabelledDataset(index, transform, seed=0, limits=limits(self.data), replacements=0)
        return self._load(dataset, self.evaluation_order(index, batch_size, limit_batches))

    def corrupted(
        self,
        index: ImageIndex,
        corruption: str,
        severity: int,
        seed: int,
        batch_size: int,
        limit_batches: int | None = None,
    ) -> Loader:
        """Load the images that `evaluation` loads, corrupted (data/corruption.py) by draws from the seed."""
        plain = eval_transform(self.preprocessing)
        transform = CorruptedTransform(
            plain.size, plain.resized, plain.interpolation, corruption=corruption, severity=severity
        )
        seed = corruption_seed(corruption, severity, seed)
        dataset = ImageDataset(index, transform, seed, limits(self.data), replacements=0)
        return self._load(dataset, self.evaluation_order(index, batch_size, limit_batches))

    def calibration(self, index: ImageIndex, images: int, batch_size: int, seed: int) -> Loader:
        """Load a fixed choice of images, drawn over all classes, as they are seen in evaluation."""
        transform = eval_transform(self.preprocessing)
        dataset = ImageDataset(index, transform, seed, limits(self.data), self.data.max_bad)
        chosen = permutation(len(index), derive_seed("calibration", seed))[:images]
        return self._load(dataset, EvalOrder(chosen, batch_size, self.world))

    def _load(self, dataset: ImageDataset, order: TrainOrder | EvalOrder) -> Loader:
        options = LoaderOptions(worker_count(self.data), self.world.device)
        mean, std = self.preprocessing.mean, self.preprocessing.std
        return Loader(dataset, order, options, mean, std, self.patience)


def worker_count(data: DataConfig) -> int:
    """Return the loader processes of this rank: as asked for, or this machine's cores shared by its ranks."""
    if data.workers is not None:
        return data.workers
    return min(16, max(1, len(os.sched_getaffinity(0)) // local_size()))


def limits(data: DataConfig) -> Limits:
    """Return what a file may demand, and what its values mean."""
    return Limits(
        data.max_bytes,
        data.max_pixels,
        None if data.value_range is None else (data.value_range[0], data.value_range[1]),
    )
