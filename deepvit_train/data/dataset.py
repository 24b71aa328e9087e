"""Images as tensors, by (epoch, index); the order of training; loaders.

Shapes: B batch, C colour channels.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from deepvit_train.data.decode import BadImageError, load_image
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.transform import Transform
from deepvit_train.determinism import derive_seed, permutation, seeded


class Key(NamedTuple):
    """Which image, in which epoch: together with the run's seed it decides every random draw of a sample."""

    epoch: int
    image: int


class Batch(NamedTuple):
    """A batch: images (B, C, height, width), targets (B,), and a line for each file that couldn't be read."""

    images: Tensor
    targets: Tensor
    bad: list[str]


class ImageDataset(Dataset):
    """Decoded, transformed images. A file that can't be read is reported and replaced by the next one."""

    def __init__(self, index: ImageIndex, transform: Transform, seed: int) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: Key) -> Batch:
        bad: list[str] = []
        with seeded(derive_seed("sample", self.seed, key.epoch, key.image)):
            for step in range(len(self.index)):
                place = (key.image + step) % len(self.index)
                try:
                    image = self.transform(load_image(self.index.path(place)))
                except BadImageError as error:
                    bad.append(str(error))
                else:
                    return Batch(image, torch.tensor(int(self.index.targets[place])), bad)
        raise RuntimeError(f"{self.index.folder}: not one of {len(self.index)} images can be read")


class TrainOrder(Sampler[list[Key]]):
    """The micro-batches of one rank, from one optimizer step to another, across epochs.

    Step s of the run takes images s * batch_size .. (s + 1) * batch_size of its epoch's permutation, whatever
    the number of ranks and micro-batches; the rest of an epoch that fills no batch is left out.
    """

    def __init__(
        self,
        images: int,
        *,
        batch_size: int,
        accumulate: int,
        steps_per_epoch: int,
        steps: range,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.steps_per_epoch = steps_per_epoch
        self.steps = steps
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch_of_order, order = -1, None
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if order is None or epoch != epoch_of_order:
                epoch_of_order, order = (
                    epoch,
                    permutation(self.images, derive_seed("order", self.seed, epoch)),
                )
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            for micro in batch.reshape(self.accumulate, self.world_size, -1):
                yield [Key(epoch, int(image)) for image in micro[self.rank]]


def eval_batches(indices: Sequence[int], batch_size: int, rank: int, world_size: int) -> list[list[Key]]:
    """The batches of one rank when every image counts exactly once: whole batches are dealt out in turn."""
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return [[Key(0, int(image)) for image in batch] for batch in batches[rank::world_size]]


@dataclass(frozen=True)
class LoaderOptions:
    """What a loader needs besides data and order; none of it changes a batch."""

    workers: int
    pin_memory: bool


def build_loader(
    dataset: ImageDataset, order: Sampler[list[Key]] | list[list[Key]], options: LoaderOptions
) -> DataLoader:
    """A loader of Batches in the given order."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=options.workers,
        collate_fn=_collate,
        pin_memory=options.pin_memory,
        worker_init_fn=_leave_signals_to_the_main_process,
        # Its own generator: taking the loader's base seed from torch's would change the draws that follow.
        generator=torch.Generator(),
    )


def _collate(samples: list[Batch]) -> Batch:
    return Batch(
        torch.stack([sample.images for sample in samples]),
        torch.stack([sample.targets for sample in samples]),
        [line for sample in samples for line in sample.bad],
    )


def _leave_signals_to_the_main_process(worker: int) -> None:
    # A stop signal to the whole process group must not kill the loaders before the main process has saved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
