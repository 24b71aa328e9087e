"""Keep what a model says of each image while it is evaluated, over all ranks.

Shapes: B batch, C classes, N images, M images whose logits are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit_train.data.order import EvalOrder
from deepvit_train.distributed.world import World

NO_ANSWER = -1  # the prediction where the model's outputs are NaN or infinite
MOST_LOGITS = 1 << 24  # values: 64 MiB; of 1,000 classes those of 16,777 images, enough for one temperature


@dataclass(frozen=True)
class Predictions:
    """What a model says of each image, in the order of the index.

    Args:
        images: numbers of the images in the index, (N,) int64.
        targets: their classes, (N,) int64.
        predicted: the classes that the model tells, or NO_ANSWER, (N,) int64.
        probability: of the class that it tells, (N,) float64; NaN where there is no answer.
        loss: cross-entropy, (N,) float64.
        kept: places in these arrays of the images whose logits are kept, (M,) int64.
        logits: theirs, (M, C) float32; -inf for a class that was left out.
    """

    images: np.ndarray
    targets: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    loss: np.ndarray
    kept: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @property
    def right(self) -> np.ndarray:
        """Whether each image was told right, (N,) bool."""
        return self.predicted == self.targets

    @property
    def answered(self) -> np.ndarray:
        """Whether the model's outputs for each image are finite, (N,) bool."""
        return self.predicted != NO_ANSWER


class Recorder:
    """Takes the logits of each batch of one rank. They stay on the device, so that nothing waits for a GPU.

    Args:
        order: the batches of this rank.
        classes: how many outputs the model has.
    """

    def __init__(self, order: EvalOrder, classes: int, world: World) -> None:
        self.order, self.classes, self.world = order, classes, world
        # Evenly over the split, so that all ranks know whose logits they keep.
        self.stride = -(-len(order.images) * classes // MOST_LOGITS) or 1
        self._starts = iter(order.starts)
        self._columns: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._places: list[np.ndarray] = []

    def add(self, logits: Tensor, targets: Tensor, told: Tensor, finite: Tensor) -> None:
        """Keep a batch.

        Args:
            logits: (B, C), float32.
            targets, told: true and predicted classes, (B,) int64.
            finite: whether the logits are, (B,) bool.
        """
        start = next(self._starts)
        places = np.arange(start, start + len(targets))
        loss = F.cross_entropy(logits, targets, reduction="none")
        probability = (logits.gather(1, told[:, None])[:, 0] - logits.logsumexp(dim=1)).exp()
        columns = [targets, told.where(finite, NO_ANSWER), probability, loss]
        self._columns.append(torch.stack([column.double() for column in columns], dim=1))
        self._places.append(places)
        chosen = np.flatnonzero(places % self.stride == 0)
        # A copy: a part of the batch would keep the whole of it in memory.
        self._logits.append(logits[torch.from_numpy(chosen).to(logits.device)])

    def gather(self) -> Predictions:
        """Return what all ranks kept. All ranks must call it together."""
        places, total = np.concatenate([np.empty(0, np.int64), *self._places]), len(self.order.images)
        own = places % self.stride == 0
        columns = self._spread(self._columns, places, total, 4, torch.float64)
        kept = np.arange(0, total, self.stride)
        rows = places[own] // self.stride
        logits = self._spread(self._logits, rows, len(kept), self.classes, torch.float32)
        targets, told, probability, loss = columns.T
        return Predictions(
            images=np.asarray(self.order.images, np.int64),
            targets=targets.astype(np.int64),
            predicted=told.astype(np.int64),
            probability=np.where(told == NO_ANSWER, np.nan, probability),
            loss=loss,
            kept=kept,
            logits=logits,
        )

    def _spread(
        self, own: list[Tensor], rows: np.ndarray, total: int, width: int, dtype: torch.dtype
    ) -> np.ndarray:
        """Return the rows of all ranks at their places, (total, width)."""
        every = torch.zeros(total, width, dtype=dtype, device=self.world.device)
        if own:
            every[torch.from_numpy(rows).to(every.device)] = torch.cat(own)
        return self.world.sum(every).cpu().numpy()
