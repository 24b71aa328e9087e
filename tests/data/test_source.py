"""Take batches: a loader process that dies is found where a batch is asked for, and nowhere else."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from deepvit_train.data.patience import LoaderLost
from deepvit_train.data.source import ProcessSource


class _Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def test_the_death_of_a_loader_process_does_not_end_a_step_in_its_middle() -> None:
    loader = DataLoader(_Numbers(), batch_size=2, num_workers=1)
    source = ProcessSource(loader)
    try:
        assert source.take(60) is not None
        worker = source._batches._workers[0]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        for _ in range(100):  # here a step would be taken
            time.sleep(0.001)
        with pytest.raises(LoaderLost, match="a loader process died"):
            _exhaust(source)
    finally:
        source._batches._shutdown_workers()


def _exhaust(source: ProcessSource) -> None:
    for _ in range(100):
        source.take(0.1)
