"""data.cache=true reads each file once, for all processes, and changes no batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from deepvit_train.config.compose import compose_command
from deepvit_train.data.dataset import ImageDataset
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import ImageIndex, scan_split
from deepvit_train.data.kept import KeptBytes, KeptPixels, free_memory
from deepvit_train.data.order import Key
from deepvit_train.data.transform import EvalTransform, Transform, eval_transform, train_transform
from deepvit_train.training.images import kept_in_memory
from tests.conftest import QUICK, Command, forked


def opened(root: Path) -> ImageIndex:
    return scan_split(root, "train", follow_links=False)


def transforms(*overrides: str) -> tuple[Transform, EvalTransform]:
    """The transforms of training and of evaluation at 16 pixels."""
    config = compose_command("train", ["model.image_size=16", *overrides])
    preprocessing = config.model.preprocessing
    return train_transform(preprocessing, config.augment), eval_transform(preprocessing)


def test_a_file_is_read_once_for_all_processes(image_folder: Path) -> None:
    index = replace(opened(image_folder), kept=KeptBytes(24, 10**6))
    expected = [Path(index.path(image)).read_bytes() for image in range(24)]

    def read(*images: int) -> None:
        assert [index.read(image, 10**6) for image in images] == [expected[image] for image in images]

    assert forked(lambda: read(*range(12)), lambda: read(*range(8, 24))) == 0
    assert isinstance(index.kept, KeptBytes)
    # Two processes may both have read an image before the other had kept it.
    assert sum(map(len, expected)) <= index.kept.used <= 2 * sum(map(len, expected))
    for image in range(24):
        Path(index.path(image)).unlink()
    read(*range(24))
    with pytest.raises(Exception, match="No such file"):
        index.read_from_disk(0, 10**6)


def test_what_does_not_fit_is_read_from_the_disk(image_folder: Path) -> None:
    index = opened(image_folder)
    sizes = [Path(index.path(image)).stat().st_size for image in range(24)]
    index = replace(index, kept=KeptBytes(24, sizes[0] + sizes[1]))
    for _ in range(2):
        for image in range(24):
            assert index.read(image, 10**6) == Path(index.path(image)).read_bytes()
    assert isinstance(index.kept, KeptBytes)
    assert index.kept.used <= index.kept.limit
    assert index.kept.get(0) is not None
    assert index.kept.get(23) is None
    assert replace(index, kept=KeptBytes(24, 0)).read(3, 10**6) == Path(index.path(3)).read_bytes()


def test_bytes_that_are_half_written_are_not_given_out() -> None:
    kept = KeptBytes(2, 100)
    kept.put(1, b"abcd")
    assert (kept.get(0), kept.get(1)) == (None, b"abcd")
    kept._memory[0:1] = b"x"
    assert kept.get(1) is None


def test_a_line_says_how_much_it_takes(image_folder: Path) -> None:
    said: list[str] = []
    index = opened(image_folder)
    (kept,) = kept_in_memory([(index, transforms("augment=basic")[0])], said.append)
    assert isinstance(kept.kept, KeptBytes)
    assert 0 < kept.kept.limit <= free_memory()
    assert said[0].startswith("cache: up to ")
    assert said[0].endswith("all will be about 0 MiB, so all of them fit")


def test_pixels_are_kept_where_nothing_varies_them(image_folder: Path) -> None:
    index, said = opened(image_folder), list[str]()
    (training, evaluation), other = transforms("augment=none"), transforms("model.image_size=8")[1]
    (index,) = kept_in_memory([(index, training)], said.append)
    assert isinstance(index.kept, KeptPixels)

    def batches(transform: Transform) -> ImageDataset:
        return ImageDataset(index, transform, seed=0, limits=Limits(10**6, 10**6, None), replacements=0)

    keys = [Key(0, image) for image in range(24)]
    first = batches(training).__getitems__(keys).pixels.clone()
    smaller = batches(other).__getitems__(keys).pixels.clone()
    for image in range(24):
        Path(index.path(image)).unlink()
    again = batches(evaluation).__getitems__(keys)
    assert (again.pixels.equal(first), again.bad) == (True, [])
    assert index.kept.pixels.used == 24 * 3 * 16 * 16
    # Another transform reads the files, which are gone.
    assert smaller.shape == (24, 3, 8, 8)
    assert len(batches(other).__getitems__(keys).bad) == 24


@pytest.mark.parametrize(
    "varied", ["flip=0.5", "erase=0.5", "crop_scale=[0.5,1]", "zoom=0.1", "color_jitter=0.1"]
)
def test_files_are_kept_where_images_are_varied(varied: str, image_folder: Path) -> None:
    training, _ = transforms("augment=none", f"augment.{varied}")
    (index,) = kept_in_memory([(opened(image_folder), training)], lambda line: None)
    assert isinstance(index.kept, KeptBytes)


@pytest.mark.runs
@pytest.mark.parametrize(("workers", "augment"), [(0, "none"), (2, "none"), (2, "basic")])
def test_a_run_is_the_same_with_it(image_folder: Path, call: Command, workers: int, augment: str) -> None:
    learn = [*QUICK, "data=imagefolder", f"augment={augment}", f"data.root={image_folder}"]
    learn += ["trainer.batch_size=4", f"data.workers={workers}"]
    assert call("train", *learn, "run_dir=plain").returncode == 0
    done = call("train", *learn, "run_dir=kept", "data.cache=true")
    assert (done.returncode, "cache: up to" in done.stdout) == (0, True), done.stderr
    plain, kept = (load_file(f"{run}/checkpoints/last/model.safetensors") for run in ("plain", "kept"))
    assert all(plain[name].equal(kept[name]) for name in plain)


def test_a_system_that_allows_no_such_memory_goes_without(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(images: int, limit: int) -> KeptBytes:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("deepvit_train.training.images.KeptBytes", refuse)
    said: list[str] = []
    index = opened(image_folder)
    assert kept_in_memory([(index, transforms()[1])], said.append) == [index]
    assert "Cannot allocate memory" in said[0]
