"""Make photographs like those of ImageNet, for benchmarks and tests.

They are parts of the pictures that scikit-learn and scikit-image bundle. Most are 500 pixels wide or high,
and all are JPEGs with 4:2:0 subsampling and a quality of 75 to 96, as in ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(500, 375), (375, 500), (500, 333), (333, 500), (500, 400), (640, 480), (400, 300), (800, 600)]
SHARES = [0.45, 0.15, 0.15, 0.05, 0.08, 0.05, 0.05, 0.02]
SOURCES = ["astronaut", "chelsea", "coffee", "ihc", "motorcycle_left", "motorcycle_right", "retina", "rocket"]


@lru_cache
def sources() -> list[Image.Image]:
    """Return the bundled pictures, as RGB."""
    import skimage
    import sklearn.datasets

    folder = Path(skimage.__file__).parent / "data"
    bundled = [next(folder.glob(f"{name}.*")) for name in SOURCES]
    pictures = [Image.open(file).convert("RGB") for file in bundled]
    photographs = sklearn.datasets.load_sample_images().images
    return [*pictures, *(Image.fromarray(pixels) for pixels in photographs)]


def photographs(count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Give `count` different photographs, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        picture = sources()[number % len(sources())]
        width, height = SIZES[rng.choice(len(SIZES), p=SHARES)]
        # The box has this aspect, 60 to 100 % of the largest possible size, and lies anywhere in the picture.
        scale = min(picture.width / width, picture.height / height) * rng.uniform(0.6, 1.0)
        left = rng.uniform(0, picture.width - scale * width)
        top = rng.uniform(0, picture.height - scale * height)
        box = (left, top, left + scale * width, top + scale * height)
        photograph = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
        yield photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else photograph


def write_photographs(root: Path, count: int, classes: int = 4, seed: int = 0) -> None:
    """Write `count` photographs to root/CLASS/NUMBER.jpg, the classes in turn."""
    rng = np.random.default_rng(seed + 1)
    for number, photograph in enumerate(photographs(count, seed)):
        folder = root / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        photograph.save(folder / f"{number:05d}.jpg", quality=int(rng.integers(75, 97)), subsampling=2)
