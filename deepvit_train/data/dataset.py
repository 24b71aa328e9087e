"""Batches of pixels, by (epoch, image).

Shapes: B batch, S the model's image size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from deepvit_train.data.absence import PAUSES_S, is_gone
from deepvit_train.data.decode import BadImageError, Limits, UnreadableError, parse_picture
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.kept import KeptBytes, KeptPixels
from deepvit_train.data.memory import ReusedMemory
from deepvit_train.data.order import Key
from deepvit_train.data.patience import POLL_S, Readers
from deepvit_train.data.shared import Block, SharedBlocks
from deepvit_train.data.transform import NOTHING_ERASED, Erasure, Transform
from deepvit_train.determinism import derive_seed, generators_kept

# Among the bad files of a batch: all images of the index are bad, and what is trained on is black.
NONE_LEFT = "no image is left"
# Among them: so many images in a row are bad that none took their place, and what is trained on is black.
NONE_NEAR = "no image is near"


class Batch(NamedTuple):
    """A batch on the device: images (B, 3, S, S) float, targets (B,), a line for each file that is bad."""

    images: Tensor
    targets: Tensor
    bad: list[str]


class RawBatch(NamedTuple):
    """A batch as it leaves a loader process: pixels (B, 3, S, S) uint8, targets (B,) int64, and what is still
    to be erased: an Erasure's numbers a row, (B, 5) int64. Small arrays need no shared memory, as tensors do.
    """

    pixels: Tensor
    targets: np.ndarray
    erase: np.ndarray
    bad: list[str]


class ImageDataset(Dataset[RawBatch]):
    """Decoded, transformed images, a batch at a time.

    A bad file is reported and replaced by the next one in the index, at most so many times in a row. After
    that the image stays black, for the run to stop at: with no replacements every bad file is an error.
    """

    def __init__(
        self, index: ImageIndex, transform: Transform, seed: int, limits: Limits, replacements: int
    ) -> None:
        self.index = index
        self.transform = transform
        self.seed = seed
        self.limits = limits
        self.replacements = replacements
        kept = index.kept
        self.kept: KeptBytes | None = None  # pixels that this transform would make again
        if isinstance(kept, KeptPixels) and kept.transform == transform:
            self.kept = kept.pixels
        self.memory = ReusedMemory(blocks=1)
        self.shared: SharedBlocks | None = None  # its loader's, in that loader's processes
        self.readers: Readers | None = None  # of its loader, which waits for a data set that is gone
        self.reader = 0  # which of them this process is

    def __getitems__(self, keys: Sequence[Key]) -> RawBatch:
        size = self.transform.size
        shape = (len(keys), 3, size, size)
        block = self._shared_block(shape)
        pixels = self._empty(shape) if block is None else block.pixels
        targets = np.empty(len(keys), np.int64)
        erase = np.empty((len(keys), len(Erasure._fields)), np.int64)
        bad: list[str] = []
        with generators_kept():
            for place, key in enumerate(keys):
                sample, targets[place], erase[place] = self._sample(key, bad)
                # Into planes by vectors, where NumPy takes six times as long.
                cv2.split(sample, list(pixels[place].numpy()))
        if self.readers is not None:
            self.readers.end(self.reader)
        sent: Any = pixels if block is None else block
        return RawBatch(sent, targets, erase, bad)

    def _shared_block(self, shape: tuple[int, ...]) -> Block | None:
        process = get_worker_info()
        if process is None or self.shared is None:
            return None
        return self.shared.take(process.id, shape)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised bytes; fresh shared ones in a loader process that has no block for them."""
        if get_worker_info() is None:
            return self.memory.empty(shape, torch.uint8)
        shared = torch.UntypedStorage._new_shared(math.prod(shape))
        return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)

    def _sample(self, key: Key, bad: list[str]) -> tuple[np.ndarray, int, Erasure]:
        seed = derive_seed("sample", self.seed, *key)
        for step in range(min(len(self.index), self.replacements + 1)):
            image = (key.image + step) % len(self.index)
            if self.readers is not None:
                self.readers.begin(self.reader, image)
            try:
                pixels, erasure = self._pixels(image, seed)
            except BadImageError as error:
                bad.append(str(error))
            else:
                return pixels, int(self.index.targets[image]), erasure
        if len(self.index) <= self.replacements:
            bad.append(NONE_LEFT)
        elif self.replacements:
            bad.append(NONE_NEAR)
        black = np.zeros((self.transform.size, self.transform.size, 3), np.uint8)
        return black, int(self.index.targets[key.image]), NOTHING_ERASED

    def _pixels(self, image: int, seed: int) -> tuple[np.ndarray, Erasure]:
        """Return the transformed image, (S, S, 3) uint8, and what is still to be erased."""
        size = self.transform.size
        if self.kept is not None and (kept := self.kept.get(image)) is not None:
            return np.frombuffer(kept, np.uint8).reshape(size, size, 3), NOTHING_ERASED
        picture = parse_picture(self.index.path(image), self._read(image), self.limits)
        pixels, erasure = self.transform(picture, seed)
        if self.kept is not None:
            self.kept.put(image, pixels.tobytes())
        return pixels, erasure

    def _read(self, image: int) -> bytes:
        """Read an image. While the data set is gone, wait until it is back or the loader gives up."""
        pauses = iter(PAUSES_S)
        while True:
            try:
                return self.index.read(image, self.limits.max_bytes)
            except UnreadableError as error:
                if self.readers is None:
                    raise
                if is_gone(self.index, image, error):
                    self.readers.begin(self.reader, image, error.number)
                    time.sleep(POLL_S)
                elif (pause := next(pauses, None)) is not None:
                    time.sleep(pause)  # it may have come back between the read and the look at it
                else:
                    raise
