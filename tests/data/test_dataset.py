"""Samples and their order: functions of (seed, epoch, image), whoever loads them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepvit_train.config import compose_command
from deepvit_train.data.dataset import (
    Batch,
    ImageDataset,
    Key,
    LoaderOptions,
    TrainOrder,
    build_loader,
    eval_batches,
)
from deepvit_train.data.decode import BadImageError, load_image
from deepvit_train.data.digits import write_digits
from deepvit_train.data.index import check_classes, scan_split
from deepvit_train.data.transform import eval_transform, train_transform
from deepvit_train.determinism import derive_seed, permutation, seeded
from deepvit_train.error import ConfigError, DataError


def order(steps: range, **options: int) -> list[list[Key]]:
    defaults = {"batch_size": 8, "accumulate": 1, "steps_per_epoch": 3, "seed": 5}
    return list(TrainOrder(26, steps=steps, **{**defaults, **options}))


def test_an_epoch_takes_each_image_at_most_once_and_epochs_differ() -> None:
    batches = order(range(6))
    first, second = (
        sorted(key.image for batch in part for key in batch) for part in (batches[:3], batches[3:])
    )
    assert len(set(first)) == len(set(second)) == 24
    assert [key.image for key in batches[0]] != [key.image for key in batches[3]]
    assert {key.epoch for batch in batches[3:] for key in batch} == {1}


def test_order_does_not_depend_on_ranks_micro_batches_or_where_it_begins() -> None:
    whole = order(range(6))
    assert order(range(4, 6)) == whole[4:]
    by_rank = [order(range(6), accumulate=2, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        parts = [by_rank[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert [key for part in parts for key in part] == batch


def test_evaluation_counts_each_image_once_over_any_number_of_ranks() -> None:
    for images, world_size in ((1, 2), (7, 2), (10, 3), (64, 4)):
        dealt = [eval_batches(range(images), 4, rank, world_size) for rank in range(world_size)]
        assert sorted(key.image for ranks in dealt for batch in ranks for key in batch) == list(range(images))


@pytest.fixture
def dataset(digits: Path) -> ImageDataset:
    config = compose_command(
        "train", ["augment.erase=0.5", "augment.flip=0.5", "augment.auto_augment=rand-m9-mstd0.5-inc1"]
    )
    return ImageDataset(scan_split(digits, "train"), train_transform(config.model, config.augment), seed=3)


def digest(batches: list[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        found.update(batch.images.numpy().tobytes() + batch.targets.numpy().tobytes())
    return found.hexdigest()


def test_samples_are_the_same_for_any_number_of_workers(dataset: ImageDataset) -> None:
    digests = set()
    for workers in (0, 1, 2):
        wanted = TrainOrder(
            len(dataset.index), batch_size=16, accumulate=1, steps_per_epoch=4, steps=range(2, 6), seed=3
        )
        digests.add(digest(list(build_loader(dataset, wanted, LoaderOptions(workers, pin_memory=False)))))
    assert len(digests) == 1


def test_a_sample_depends_on_seed_epoch_and_image_alone(dataset: ImageDataset) -> None:
    first = dataset[Key(0, 7)].images
    torch.rand(5)
    random.random()
    assert torch.equal(dataset[Key(0, 7)].images, first)
    assert not torch.equal(dataset[Key(1, 7)].images, first)
    other = ImageDataset(dataset.index, dataset.transform, seed=4)
    assert not torch.equal(other[Key(0, 7)].images, first)


def test_loading_leaves_the_generators_as_they_were(dataset: ImageDataset) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    list(build_loader(dataset, [[Key(0, 1), Key(0, 2)]], LoaderOptions(0, pin_memory=False)))
    assert (torch.rand(1), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_seeds_differ_by_purpose_and_number() -> None:
    seeds = {derive_seed(purpose, *numbers) for purpose in "ab" for numbers in ((1, 2), (12,), (2, 1))}
    assert len(seeds) == 6
    assert sorted(permutation(9, seed=1)) == list(range(9))


def test_generators_are_put_back_after_an_error() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unreadable_image_is_named_and_replaced_by_the_next(image_folder: Path) -> None:
    index = scan_split(image_folder, "train")
    broken = index.path(3)
    broken.write_bytes(broken.read_bytes()[:100])
    index.path(4).write_bytes(b"")
    dataset = ImageDataset(index, eval_transform(compose_command("train", []).model), seed=0)
    sample = dataset[Key(0, 3)]
    assert torch.equal(sample.images, dataset[Key(0, 5)].images)
    assert [line.split(":")[0] for line in sample.bad] == [str(index.path(3)), str(index.path(4))]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(grey.astype({"I": np.int32, "F": np.float32}[mode]))
    else:
        image = Image.fromarray(grey).convert(mode)
    file = tmp_path / "image.tiff"
    image.save(file)
    loaded = load_image(file)
    assert (loaded.mode, loaded.size) == ("RGB", (8, 8))
    if mode not in ("1", "P"):
        assert np.abs(np.asarray(loaded)[:, :, 0].astype(int) - grey).max() <= 2


def test_an_image_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (4, 6)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_a_bad_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(BadImageError, match=r"bad\.png"):
        load_image(tmp_path / "bad.png")


def test_the_digits_are_always_split_the_same(tmp_path: Path) -> None:
    write_digits(tmp_path)
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.png"))
    assert len(files) == 1797
    assert sum(file.parts[0] == "val" for file in files) == 364
    assert hashlib.sha256("".join(map(str, files)).encode()).hexdigest()[:16] == "a2790dae83f388be"


def test_an_index_is_sorted_and_knows_its_classes(image_folder: Path) -> None:
    index = scan_split(image_folder, "train")
    assert index.classes == ["ant", "bee", "cat"]
    assert index.path(9) == image_folder / "train" / "bee" / "1.png"
    assert index.targets.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_what_is_wrong_with_a_folder_is_named(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds train, val"):
        scan_split(image_folder, "test")
    (image_folder / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="no image in class dog"):
        scan_split(image_folder, "val")
    with pytest.raises(DataError, match=r"unknown to the model: cat; missing: dog"):
        check_classes(scan_split(image_folder, "train"), ["ant", "bee", "dog"])


def test_an_unknown_policy_is_a_configuration_error() -> None:
    config = compose_command("train", ["augment.auto_augment=best"])
    with pytest.raises(ConfigError, match=r"augment\.auto_augment=best"):
        train_transform(config.model, config.augment)
