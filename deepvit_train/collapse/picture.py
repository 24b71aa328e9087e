"""A small drawing of similarity matrices for TensorBoard, with axes and a scale, in a few milliseconds.

Matplotlib would take longer for one such picture than a look at the attention maps may cost.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 128  # of a matrix, pixels; a deeper model's matrix has at least a pixel for each cell
MARGIN = 32  # around a matrix, for its title, its numbers and the names of its axes
BAR = 14  # width of the scale
INK = (40, 40, 40)


def draw_matrices(matrices: dict[str, Tensor]) -> Tensor:
    """Draw similarity matrices (L, L) side by side, with a title each, and the scale from -1 to 1.

    Returns (1, 3, height, width) in 0..1.
    """
    (depth, _), *_ = (matrix.shape for matrix in matrices.values())
    cell = max(1, SIDE // depth)
    side = cell * depth
    width = len(matrices) * (side + MARGIN) + 2 * MARGIN
    picture = Image.new("RGB", (width, side + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for number, (title, matrix) in enumerate(matrices.items()):
        left = MARGIN + number * (side + MARGIN)
        picture.paste(_coloured(matrix).resize((side, side), Image.Resampling.NEAREST), (left, MARGIN))
        draw.rectangle((left - 1, MARGIN - 1, left + side, MARGIN + side), outline=INK)
        _text(draw, (left + side / 2, MARGIN / 2), title)
        _text(draw, (left + side / 2, side + 1.7 * MARGIN), "block")
        for block in sorted({0, depth // 2, depth - 1}):
            place = (block + 0.5) * cell
            _text(draw, (left + place, side + 1.2 * MARGIN), str(block))
            _text(draw, (left - 10, MARGIN + place), str(block))
    left = len(matrices) * (side + MARGIN) + MARGIN // 2
    scale = _coloured(torch.linspace(1, -1, side)[:, None])
    picture.paste(scale.resize((BAR, side), Image.Resampling.NEAREST), (left, MARGIN))
    for value in (1, 0, -1):
        _text(draw, (left + BAR + 12, MARGIN + (1 - value) / 2 * (side - 1)), str(value))
    pixels = torch.from_numpy(np.array(picture))
    return pixels.permute(2, 0, 1)[None].float() / 255


def _coloured(values: Tensor) -> Image.Image:
    """Colour values (rows, columns): blue is -1, white 0, red 1, grey what is no number."""
    kept = values.float().nan_to_num().clamp(-1, 1)
    red, blue = 1 - (-kept).clamp(min=0), 1 - kept.clamp(min=0)
    colours = torch.stack([red, torch.minimum(red, blue), blue], dim=-1)
    colours[values.isnan()] = 0.5
    return Image.fromarray((colours * 255).round().byte().cpu().numpy())


def _text(draw: ImageDraw.ImageDraw, middle: tuple[float, float], text: str) -> None:
    draw.text(middle, text, fill=INK, font=_font(), anchor="mm")


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(11)
