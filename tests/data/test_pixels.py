"""Compare the tensor of one image with what the evaluation's loader gives for its file, bit for bit."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from deepvit_train.config.compose import compose_command
from deepvit_train.config.preprocessing import Interpolation, Preprocessing
from deepvit_train.data.decode import Limits
from deepvit_train.data.index import open_split
from deepvit_train.data.loaders import Loaders, limits
from deepvit_train.data.order import ALONE
from deepvit_train.data.pixels import ImageTransform
from deepvit_train.error import DataError
from deepvit_train.models import DeepViT

SQUARE = Preprocessing(48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875, Interpolation.bicubic)
LIMITS = Limits(max_bytes=10**8, max_pixels=10**6)


def evaluated(root: Path, preprocessing: Preprocessing, *overrides: str) -> tuple[list[str], torch.Tensor]:
    """The files of a data set's validation split, and their pixels as an evaluation sees them."""
    chosen = ["data=imagefolder", f"data.root={root}", "data.workers=0", *overrides]
    data = compose_command("train", chosen).data
    index = open_split(data, "val")
    (batch,) = Loaders(preprocessing, data, ALONE).evaluation(index, batch_size=100)
    assert batch.bad == []
    return [str(index.path(number)) for number in range(len(index))], batch.images


def write(root: Path, name: str, image: Image.Image, **options: Any) -> None:
    file = root / "val" / "a" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)


@pytest.mark.parametrize(
    "preprocessing",
    [SQUARE, replace(SQUARE, image_size=32, crop_pct=1.0, interpolation=Interpolation.bilinear)],
)
def test_the_pixels_are_those_of_an_evaluation(
    tmp_path: Path, photographs: list[Path], preprocessing: Preprocessing
) -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for number, file in enumerate(photographs[:4]):
        image = Image.open(file).convert("RGB")
        write(tmp_path, f"{number}.jpg", image, quality=85)
        write(tmp_path, f"{number}-turned.jpg", image, exif=turned)
        write(tmp_path, f"{number}-grey.jpg", image.convert("L"))
        write(tmp_path, f"{number}.png", image)
        write(tmp_path, f"{number}-turned.png", image, exif=turned)
        write(tmp_path, f"{number}-palette.png", image.convert("P"), transparency=3)
    write(tmp_path, "exact.jpg", Image.open(photographs[0]).convert("RGB").resize((32, 32)))
    files, expected = evaluated(tmp_path, preprocessing)
    assert len(files) == 25
    transform = ImageTransform(preprocessing, LIMITS)
    for file, pixels in zip(files, expected, strict=True):
        with Image.open(file) as image:
            for given in (file, Path(file), Path(file).read_bytes(), image):
                found = transform(given)
                assert torch.equal(found, pixels), (file, type(given))
    assert (found.shape, found.dtype, found.is_contiguous()) == (expected.shape[1:], torch.float32, True)


def test_values_of_more_than_8_bits(tmp_path: Path) -> None:
    grey = np.linspace(0, 4095, 64 * 64, dtype=np.uint16).reshape(64, 64)
    write(tmp_path, "grey.png", Image.fromarray(grey))
    (file,), expected = evaluated(tmp_path, SQUARE, "data.value_range=[0,4095]")
    narrow = ImageTransform(SQUARE, replace(LIMITS, value_range=(0, 4095)))
    assert torch.equal(narrow(file), expected[0])
    assert torch.equal(narrow(Image.open(file)), expected[0])
    assert not torch.equal(ImageTransform(SQUARE, LIMITS)(file), expected[0])


def test_what_is_no_image_is_an_error_of_the_data(tmp_path: Path) -> None:
    transform = ImageTransform(SQUARE, LIMITS)
    Image.new("RGB", (32, 32)).save(whole := io.BytesIO(), "PNG")
    (tmp_path / "text.jpg").write_text("no image")
    cut = Image.open(io.BytesIO(whole.getvalue()[:60]))
    for given, told in [
        (tmp_path / "none.jpg", "none.jpg: No such file"),
        (str(tmp_path), f"{tmp_path}: "),
        (tmp_path / "text.jpg", "text.jpg: cannot identify"),
        (b"", "image: cannot identify"),
        (whole.getvalue()[:60], "image: "),
        (cut, "image: "),
        (Image.new("L", (1001, 1000)), "image: 1001 x 1000 pixels, more than data.max_pixels=1000000"),
    ]:
        with pytest.raises(DataError, match=told):
            transform(given)
    with pytest.raises(TypeError, match="ndarray"):
        transform(np.zeros((8, 8, 3), np.uint8))  # pyright: ignore[reportArgumentType]


def test_the_limits_of_a_model_are_those_of_a_run(tmp_path: Path) -> None:
    model = DeepViT(image_size=32, patch_size=8, num_classes=2, dim=8, depth=1, heads=1, mlp_dim=8)
    config = compose_command("train", ["data=imagefolder", f"data.root={tmp_path}"])
    assert model.transform.limits == limits(config.data)
    assert model.transform.preprocessing == model.preprocessing
    model.set_input_size(64)
    assert model.transform(Image.new("RGB", (100, 80))).shape == (3, 64, 64)
