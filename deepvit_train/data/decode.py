"""From a file to an RGB image, whatever its kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class BadImageError(Exception):
    """A file that can't be read as an image; the message names it and says why."""


def load_image(path: Path) -> Image.Image:
    """The image as 8-bit RGB, turned upright by its EXIF tag. Raises BadImageError."""
    try:
        with Image.open(path) as image:
            return _as_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise nearly every kind of exception on broken files; each means the same here.
        raise BadImageError(f"{path}: {error or type(error).__name__}") from None


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow's own conversion clips 16-bit grey values at 255.
        values = np.asarray(image, dtype=np.float32)
        depth = 65535.0 if values.max(initial=0.0) > 255 else 255.0
        image = Image.fromarray((values * (255.0 / depth)).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
