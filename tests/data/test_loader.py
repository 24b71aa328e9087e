"""Load batches: they are the same for any number of processes, ranks and resumes."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from timm.data.random_erasing import RandomErasing

from deepvit_train.config.compose import compose_command
from deepvit_train.data.dataset import Batch, ImageDataset
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import scan_split
from deepvit_train.data.loader import Loader, LoaderOptions
from deepvit_train.data.order import TrainOrder
from deepvit_train.data.transform import denormalise, train_transform
from deepvit_train.distributed.world import World
from tests.watch import watching

CPU = torch.device("cpu")
BATCH, STEPS = 16, 4
CONFIG = compose_command("train", ["augment=deit", "augment.color_jitter=0.4", "augment.repeats=3"])


@pytest.fixture
def dataset(digits: Path) -> ImageDataset:
    transform = train_transform(CONFIG.model.preprocessing, CONFIG.augment)
    limits = Limits(max_bytes=10**7, max_pixels=10**7)
    return ImageDataset(scan_split(digits, "train", False), transform, 3, limits, replacements=0)


def batches(
    dataset: ImageDataset, steps: range, workers: int = 0, rank: int = 0, ranks: int = 1
) -> list[Batch]:
    order = TrainOrder(
        len(dataset.index),
        batch_size=BATCH,
        accumulate=1,
        steps_per_epoch=STEPS,
        steps=steps,
        seed=3,
        repeats=3,
        world=World(rank, ranks, CPU),
    )
    options = LoaderOptions(workers, CPU)
    return list(Loader(dataset, order, options, CONFIG.model.mean, CONFIG.model.std))


def hashes(parts: list[Batch]) -> list[str]:
    """One hash a sample: of its pixels, after erasing, and its target."""
    return [
        hashlib.sha256(image.numpy().tobytes() + bytes([int(target)])).hexdigest()
        for batch in parts
        for image, target in zip(batch.images, batch.targets, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_samples_are_the_same_for_any_number_of_workers(dataset: ImageDataset) -> None:
    steps = range(2, 6)
    alone = hashes(batches(dataset, steps))
    assert len(set(alone)) == len(alone) == 4 * BATCH
    for workers in (1, 2, 4):
        assert hashes(batches(dataset, steps, workers)) == alone


def test_two_ranks_together_see_the_samples_of_one(dataset: ImageDataset) -> None:
    alone = batches(dataset, range(STEPS))
    shared = [batches(dataset, range(STEPS), workers=1, rank=rank, ranks=2) for rank in range(2)]
    for step in range(STEPS):
        assert hashes([shared[0][step], shared[1][step]]) == hashes([alone[step]])


def test_a_resume_after_any_batch_of_an_epoch_sees_the_rest_of_it(dataset: ImageDataset) -> None:
    whole = hashes(batches(dataset, range(STEPS)))
    for done in range(1, STEPS):
        assert hashes(batches(dataset, range(done, STEPS))) == whole[done * BATCH :]


def test_a_resume_reads_nothing_that_was_passed(dataset: ImageDataset, digits: Path) -> None:
    read: list[str] = []
    with watching(digits, read.append):
        batches(dataset, range(STEPS - 1, STEPS))
    assert len(read) == BATCH


def test_a_loader_can_be_iterated_over_again(dataset: ImageDataset) -> None:
    order = TrainOrder(
        len(dataset.index), batch_size=8, accumulate=1, steps_per_epoch=3, steps=range(3), seed=1
    )
    loader = Loader(dataset, order, LoaderOptions(1, CPU), [0.5] * 3, [0.5] * 3)
    first = hashes(list(loader))
    assert (hashes(list(loader)), len(loader)) == (first, 3)


def test_pixels_are_normalised_by_mean_and_standard_deviation(dataset: ImageDataset) -> None:
    order = TrainOrder(
        len(dataset.index), batch_size=8, accumulate=1, steps_per_epoch=1, steps=range(1), seed=1
    )
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    loader = Loader(dataset, order, LoaderOptions(0, CPU), mean, std)
    raw = next(iter(loader.raw))
    raw = raw._replace(erase=np.zeros_like(raw.erase))
    images = loader.prepare(raw).images
    expected = (raw.pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    torch.testing.assert_close(images, expected.float(), rtol=0, atol=1e-6)
    assert images.is_contiguous()
    CONFIG.model.mean, CONFIG.model.std = mean, std
    try:
        torch.testing.assert_close(
            denormalise(images, CONFIG.model.preprocessing) * 255, raw.pixels.float(), rtol=0, atol=1e-3
        )
    finally:
        CONFIG.model.mean, CONFIG.model.std = [0.5] * 3, [0.5] * 3


def test_erasing_is_distributed_as_timms(digits: Path) -> None:
    config = compose_command("train", ["augment=none", "augment.erase=0.25", "model.image_size=32"])
    limits = Limits(max_bytes=10**7, max_pixels=10**7)
    transform = train_transform(config.model.preprocessing, config.augment)
    dataset = ImageDataset(scan_split(digits, "train", False), transform, 0, limits, replacements=0)
    order = TrainOrder(1433, batch_size=1400, accumulate=1, steps_per_epoch=1, steps=range(3), seed=0)
    loader = Loader(dataset, order, LoaderOptions(0, CPU), [0.0] * 3, [1.0] * 3)
    ours = [erasure[2:4].tolist() for raw in loader.raw for erasure in raw.erase if erasure[2]]
    blank = torch.full((4200, 3, 32, 32), 100.0)
    erased = RandomErasing(0.25, mode="pixel", device="cpu")(blank).ne(100.0)[:, 0]
    theirs = [[int(mask.any(1).sum()), int(mask.any(0).sum())] for mask in erased if mask.any()]
    assert abs(len(ours) - 1050) < 5 * 28  # five standard deviations of a binomial count
    assert abs(len(theirs) - 1050) < 5 * 28
    for measure in (lambda box: box[0] * box[1] / 1024, lambda box: box[0] / box[1]):
        assert ks_2samp([measure(box) for box in ours], [measure(box) for box in theirs]).pvalue > 0.001
    noise = loader.prepare(next(iter(loader.raw))).images
    values = noise[(noise > 1) | (noise < 0)]
    assert len(values) > 10_000
    assert values.abs().max() < 6


@pytest.mark.runs
def test_a_process_with_open_loaders_can_end(digits: Path) -> None:
    script = (
        "import sys, torch\n"
        "from tests.data.test_loader import *\n"
        "transform = train_transform(CONFIG.model.preprocessing, CONFIG.augment)\n"
        f"index = scan_split(Path({str(digits)!r}), 'train', False)\n"
        "dataset = ImageDataset(index, transform, 3, Limits(10**7, 10**7), replacements=0)\n"
        "order = TrainOrder(1433, batch_size=8, accumulate=1, steps_per_epoch=9, steps=range(9), seed=0)\n"
        "loader = Loader(dataset, order, LoaderOptions(1, CPU), [0.5] * 3, [0.5] * 3)\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
        "kept = sys.modules['kept'] = batches\n"
        "raise SystemExit(7)\n"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, timeout=120)
    assert done.returncode == 7
