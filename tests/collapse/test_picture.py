"""Show that the picture of similarity matrices has each value's colour at its place, and text around it."""

from __future__ import annotations

import pytest
import torch

from deepvit_train.collapse.picture import MARGIN, SIDE, draw_matrices


@pytest.mark.parametrize("depth", [1, 2, 12, 300])
def test_each_cell_has_its_colour_and_the_margins_have_the_words(depth: int) -> None:
    matrix = torch.linspace(-1, 1, depth * depth).reshape(depth, depth)
    matrix[0, 0] = torch.nan
    picture = draw_matrices({"pre-mix maps, centred": -matrix, "pre-mix maps, raw": matrix})[0]
    cell = max(1, SIDE // depth)
    side = cell * depth
    assert picture.shape == (3, side + 2 * MARGIN, 2 * (side + MARGIN) + 2 * MARGIN)
    for left, sign in ((MARGIN, -1), (side + 2 * MARGIN, 1)):
        for row, column in {(depth - 1, depth - 1), (depth // 2, 0), (0, depth - 1)} - {(0, 0)}:
            value = sign * float(matrix[row, column])
            seen = picture[:, MARGIN + row * cell + cell // 2, left + column * cell + cell // 2]
            red, blue = 1 - max(-value, 0), 1 - max(value, 0)
            torch.testing.assert_close(seen, torch.tensor([red, min(red, blue), blue]), atol=0.003, rtol=0)
        grey = picture[:, MARGIN + cell // 2, left + cell // 2]
        torch.testing.assert_close(grey, torch.full((3,), 0.5), atol=0.003, rtol=0)
    for part in (picture[:, : MARGIN - 2], picture[:, -MARGIN + 2 :], picture[:, :, : MARGIN - 2]):
        assert (part < 0.5).any()  # a title, names of the axes, numbers of blocks
    top, middle, bottom = picture[:, [MARGIN, MARGIN + side // 2, MARGIN + side - 1], -3 * MARGIN // 2 + 5].T
    assert top.tolist() == [1.0, 0.0, 0.0]
    assert bottom.tolist() == [0.0, 0.0, 1.0]
    assert middle.min() > 0.9 or depth == 1
