"""Every random draw depends on a seed and on what it is for. It never depends on what was drawn before."""

from __future__ import annotations

import hashlib
import os
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


@contextmanager
def deterministic_kernels(asked: bool) -> Iterator[None]:
    """Let torch choose kernels that add in one order, if that is asked for, so that runs repeat on a GPU.

    An operation that has no such kernel raises RuntimeError. On the CPU nothing changes: every kernel of a
    training step adds in one order there, for a given number of threads.
    """
    if not asked:
        yield
        return
    # cuBLAS reads it once, at its first product in a process: two workspaces of fixed sizes.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False  # it would choose by time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def permutation(count: int, seed: int) -> np.ndarray:
    """Return arange(count), int64, in an order that depends on the seed alone."""
    return np.random.default_rng(seed).permutation(count)
