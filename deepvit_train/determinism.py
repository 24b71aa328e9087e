"""Every random draw depends on a seed and on what it is for. It never depends on what was drawn before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed for a purpose and numbers: derive_seed('sample', seed, epoch, image)."""
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the CPU generators of Python, NumPy and torch back afterwards, as they were before."""
    # Only torch's CPU generator: a forked loader process must not touch CUDA.
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


def seed_generators(seed: int) -> None:
    """Seed the three global generators. Augmentations of timm and torchvision draw from all of them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global CPU generators inside, and put them back afterwards."""
    with generators_kept():
        seed_generators(seed)
        yield


def permutation(count: int, seed: int) -> np.ndarray:
    """Return arange(count), int64, in an order that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(count)
