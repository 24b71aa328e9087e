"""Read a picture from a file, as an index and a data set do between them."""

from __future__ import annotations

from deepvit_train.data.decode import Limits, Picture, parse_picture, read_file


def open_picture(path: str, limits: Limits) -> Picture:
    """Read a file and look at its head. Raises BadImageError for what is no image or more than the limits."""
    return parse_picture(path, read_file(path, limits.max_bytes), limits)
