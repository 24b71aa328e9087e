"""Show that loader processes share the index: their memory does not grow, epoch after epoch."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepvit_train.config.compose import compose_command
from deepvit_train.data.dataset import ImageDataset
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import ImageIndex, scan_split
from deepvit_train.data.loader import Loader, LoaderOptions
from deepvit_train.data.order import TrainOrder
from deepvit_train.data.transform import train_transform

ENTRIES, EPOCHS, STEPS, BATCH = 1_000_000, 5, 100, 64


@dataclass(frozen=True)
class ListIndex(ImageIndex):
    """An index that keeps its paths as a list of str, as ImageFolder does."""

    listed: list[str] = field(default_factory=list)

    def path(self, image: int) -> str:
        return self.listed[image]


def pss_mib(process: int | None) -> float:
    """A process's memory, MiB, shared pages divided by the processes that share them."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


def measure(root: Path, listed: bool) -> list[float]:
    """Memory of two loader processes together after the first batches, then after each epoch.

    The index has a million entries, each one of the digits' files; batches take theirs from anywhere in it.
    """
    few = scan_split(root, "train", follow_links=False)
    paths = [few.path(image)[len(str(few.folder)) + 1 :] for image in range(len(few))]
    places = np.random.default_rng(0).integers(len(few), size=ENTRIES)
    names = [paths[place].encode() for place in places]
    index = replace(
        few,
        paths=np.frombuffer(b"".join(names), dtype=np.uint8),
        ends=np.array([len(name) for name in names], dtype=np.int64).cumsum(),
        targets=few.targets[places],
    )
    del names
    if listed:
        paths = [index.path(image) for image in range(ENTRIES)]
        index = ListIndex(index.folder, index.classes, index.paths, index.ends, index.targets, listed=paths)
    config = compose_command("train", ["augment=basic", "model.image_size=8", "model.patch_size=2"])
    transform = train_transform(config.model.preprocessing, config.augment)
    dataset = ImageDataset(index, transform, 0, Limits(10**7, 10**7), replacements=0)
    order = TrainOrder(
        ENTRIES,
        batch_size=BATCH,
        accumulate=1,
        steps_per_epoch=STEPS,
        steps=range(EPOCHS * STEPS),
        seed=0,
    )
    loader = Loader(dataset, order, LoaderOptions(2, torch.device("cpu")), [0.5] * 3, [0.5] * 3)
    taken = []
    for step, _ in enumerate(loader):
        if step == 20 or (step + 1) % STEPS == 0:
            taken.append(sum(pss_mib(worker.pid) for worker in multiprocessing.active_children()))
    loader.close()
    return taken


@pytest.mark.slow
@pytest.mark.parametrize("listed", [False, True])
def test_the_memory_of_loader_processes_does_not_grow(digits: Path, listed: bool) -> None:
    script = (
        "import json; from pathlib import Path; from tests.data.test_memory import measure\n"
        f"print(json.dumps(measure(Path({str(digits)!r}), {listed})))"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    first, *epochs = json.loads(done.stdout)
    assert len(epochs) == EPOCHS
    growth = max(epochs) / first - 1
    if listed:
        assert growth > 0.1, epochs  # what copying looks like to this measure
    else:
        assert growth < 0.05, epochs
