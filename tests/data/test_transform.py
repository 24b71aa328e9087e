"""Compare evaluation, augmentation and policies with Pillow, torchvision and timm."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms_factory import create_transform
from torchvision.transforms import InterpolationMode, v2

from deepvit_train.config.compose import compose_command
from deepvit_train.data.decode import Limits
from deepvit_train.data.transform import build_policy, eval_transform, train_transform
from deepvit_train.determinism import seed_generators
from deepvit_train.error import ConfigError
from tests.data.picture import open_picture

LIMITS = Limits(max_bytes=10**8, max_pixels=10**8)


def test_an_evaluation_sees_what_timm_shows(photographs: list[Path]) -> None:
    for crop_pct in (0.875, 1.0):
        model = compose_command("train", ["model.image_size=224", f"model.crop_pct={crop_pct}"]).model
        ours = eval_transform(model.preprocessing)
        theirs = create_transform(224, interpolation="bicubic", crop_pct=crop_pct, normalize=False)
        for file in photographs[:30]:
            pixels, erasure = ours(open_picture(str(file), LIMITS), seed=0)
            assert not erasure.height
            expected = np.asarray(theirs(Image.open(file))).transpose(1, 2, 0)
            assert np.abs(pixels.astype(int) - expected).max() <= 2
            assert np.abs(pixels.astype(int) - expected).mean() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (3, 2), (17, 1000)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_any_shape_of_picture_fills_the_input(tmp_path: Path, size: tuple[int, int], kind: str) -> None:
    config = compose_command("train", ["augment=deit", "model.image_size=64", "model.crop_pct=0.9"])
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "image", kind)
    picture = open_picture(str(tmp_path / "image"), LIMITS)
    preprocessing = config.model.preprocessing
    for transform in (eval_transform(preprocessing), train_transform(preprocessing, config.augment)):
        for seed in range(20):
            pixels, _ = transform(picture, seed)
            assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    centre = eval_transform(preprocessing)(picture, 0)[0]
    assert np.abs(centre.astype(int) - [200, 100, 50]).max() <= 3


def test_half_of_the_pictures_are_flipped(photographs: list[Path]) -> None:
    config = compose_command("train", ["augment=none", "augment.flip=0.5", "model.image_size=32"])
    picture = open_picture(str(photographs[0]), LIMITS)
    plain = eval_transform(config.model.preprocessing)(picture, 0)[0]
    transform = train_transform(config.model.preprocessing, config.augment)
    seen = [transform(picture, seed)[0] for seed in range(400)]
    flipped = sum(np.array_equal(pixels, plain[:, ::-1]) for pixels in seen)
    assert flipped + sum(np.array_equal(pixels, plain) for pixels in seen) == 400
    assert abs(flipped - 200) < 5 * 10


def test_a_random_interpolation_is_one_of_two_and_changes_nothing_else(photographs: list[Path]) -> None:
    picture = open_picture(str(photographs[0]), LIMITS)

    def seen(*overrides: str) -> list[bytes]:
        config = compose_command("train", ["augment=none", "model.image_size=32", *overrides])
        transform = train_transform(config.model.preprocessing, config.augment)
        return [transform(picture, seed)[0].tobytes() for seed in range(200)]

    bilinear, bicubic = (seen(f"model.interpolation={name}")[0] for name in ("bilinear", "bicubic"))
    drawn = seen("augment.random_interpolation=true")
    assert bilinear != bicubic
    assert set(drawn) == {bilinear, bicubic}
    assert abs(drawn.count(bicubic) - 100) < 5 * 7
    assert drawn == seen("augment.random_interpolation=true")


@pytest.mark.parametrize(
    "name",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-m9-mstd0.5",
        "rand-m15-n3-mstd1.0-mmax15",
        "3a",
        "v0",
        "original-mstd0.5",
        "augmix-m5-w2-d1",
    ],
)
def test_timms_policies_never_fail(name: str) -> None:
    policy = build_policy(name, compose_command("train", []).model.preprocessing)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    random.seed(0)
    for _ in range(1500):
        assert policy(image).size == (16, 16)


@pytest.mark.parametrize("operation", auto_augment._RAND_INCREASING_TRANSFORMS)
def test_each_operation_takes_the_highest_magnitude(operation: str) -> None:
    policy = build_policy("rand-m10-p1.0-inc1", compose_command("train", []).model.preprocessing)
    (chosen,) = [one for one in policy.ops if one.name == operation]
    random.seed(0)
    for _ in range(5):
        assert chosen(Image.new("RGB", (16, 16), (90, 60, 30))).size == (16, 16)


def test_a_magnitude_beyond_ten_is_taken() -> None:
    policy = build_policy("rand-m15-p1.0-mmax15-inc1", compose_command("train", []).model.preprocessing)
    random.seed(0)
    for _ in range(200):
        assert policy(Image.new("RGB", (16, 16), (90, 60, 30))).size == (16, 16)


@pytest.mark.parametrize("name", ["best", "rand-m9-tweights-n20", "augmix-a0"])
def test_an_unknown_policy_is_a_configuration_error(name: str) -> None:
    config = compose_command("train", [f"augment.auto_augment={name}"])
    with pytest.raises(ConfigError, match=rf"augment\.auto_augment={name}"):
        train_transform(config.model.preprocessing, config.augment)


def test_trivial_is_torchvisions_by_the_draws_of_the_sample(photographs: list[Path]) -> None:
    config = compose_command("train", ["augment=trivial", "augment.crop_scale=null", "model.image_size=32"])
    preprocessing = config.model.preprocessing
    picture = open_picture(str(photographs[0]), LIMITS)
    transform, plain = train_transform(preprocessing, config.augment), eval_transform(preprocessing)
    theirs = v2.TrivialAugmentWide(
        interpolation=InterpolationMode.BILINEAR, fill=[round(255 * mean) for mean in preprocessing.mean]
    )
    changed = 0
    for seed in range(100):
        pixels, _ = transform(picture, seed)
        draws = random.Random(seed)
        expected = plain(picture, 0)[0]
        if draws.random() < 0.5:
            expected = np.ascontiguousarray(expected[:, ::-1])
        seed_generators(draws.getrandbits(63))
        changed += not np.array_equal(pixels, expected)
        assert np.array_equal(pixels, np.asarray(theirs(Image.fromarray(expected))))
    assert changed > 70
