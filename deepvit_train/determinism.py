"""Every random draw comes from a seed and the name of what it is for, never from what was drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed from a purpose and numbers alone: derive_seed('sample', seed, epoch, image)."""
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators inside, and put back their states after.

    Augmentations of timm and torchvision draw from all three.
    """
    # Only torch's CPU generator: a forked loader process must not touch CUDA.
    generator = torch.default_generator
    states = random.getstate(), np.random.get_state(), generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm draws from the global generator
    generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        generator.set_state(states[2])


def permutation(count: int, seed: int) -> np.ndarray:
    """A shuffled arange(count), int64, that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(count)
