"""Which images make the batches of a rank: in training across epochs, in evaluation each once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from deepvit_train.data.balance import BalancedOrder
from deepvit_train.determinism import derive_seed, permutation
from deepvit_train.distributed.world import World

ALONE = World(rank=0, size=1, device=torch.device("cpu"))  # one process that reads everything


class Key(NamedTuple):
    """Which image, in which epoch, for which time in it.

    Together with the run's seed it decides every random draw of a sample.
    """

    epoch: int
    image: int
    repeat: int = 0


@dataclass(eq=False)
class TrainOrder(Sampler[list[Key]]):
    """The micro-batches of one rank, from one optimizer step to another, across epochs.

    Step s of the run takes images s * batch_size .. (s + 1) * batch_size of its epoch's order, whatever the
    number of ranks and micro-batches; the rest of an epoch that fills no batch is left out. The order is a
    permutation of the images, unless a balance shows some more often. With repeats each image follows itself
    so many times, and the epoch ends after as many samples as without (repeated augmentation: Hoffer et al.,
    arXiv 1901.09335).

    timm's mixup pairs the first image of a batch with its last, the second with the last but one. With
    `mirrored` every micro-batch holds whole pairs of the step's batch, so the pairs are the same whatever the
    number of ranks and micro-batches.
    """

    images: int
    _: KW_ONLY
    batch_size: int
    accumulate: int
    steps_per_epoch: int
    steps: range
    seed: int
    repeats: int = 1
    balanced: BalancedOrder | None = None
    world: World = ALONE
    mirrored: bool = False

    @property
    def largest_batch(self) -> int:
        """The images of a micro-batch."""
        return self.batch_size // (self.accumulate * self.world.size)

    def __len__(self) -> int:
        return len(self.steps) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        epoch_of_order, order, before = -1, np.empty(0), np.empty(0)
        for step in self.steps:
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != epoch_of_order:
                epoch_of_order = epoch
                if self.balanced is None:
                    order = permutation(self.images, derive_seed("order", self.seed, epoch))
                    before = np.zeros(self.images, np.int64)
                else:
                    order, before = self.balanced.epoch(self.seed, epoch)
            whole = np.arange(place * self.batch_size, (place + 1) * self.batch_size)
            for micro in self._dealt(whole):
                places, repeats = np.divmod(micro[self.world.rank], self.repeats)
                # A number for each time that an image is shown, so that each time is varied by its own draws.
                repeats += self.repeats * before[places]
                yield [
                    Key(epoch, image, repeat)
                    for image, repeat in zip(order[places].tolist(), repeats.tolist(), strict=True)
                ]

    def _dealt(self, places: np.ndarray) -> np.ndarray:
        """The places of a batch by micro-batch and rank: (accumulate, ranks, images of a micro-batch)."""
        parts = self.accumulate * self.world.size
        half = len(places) // parts // 2 * parts if self.mirrored else len(places)
        first, last = places[:half].reshape(parts, -1), places[half:].reshape(parts, -1)[::-1]
        return np.concatenate([first, last], axis=1).reshape(self.accumulate, self.world.size, -1)


class EvalOrder(Sampler[list[Key]]):
    """The batches of one rank; each chosen image counts exactly once, whole batches are dealt in turn."""

    def __init__(
        self,
        images: np.ndarray,
        batch_size: int,
        world: World = ALONE,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.starts = range(world.rank * batch_size, len(images), world.size * batch_size)

    @property
    def largest_batch(self) -> int:
        """The most images of a batch."""
        return min(self.batch_size, len(self.images))

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in self.starts:
            yield [Key(0, image) for image in self.images[start : start + self.batch_size].tolist()]
