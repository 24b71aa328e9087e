"""Figures can be read: no label of an axis lies on another one, however few and large the steps are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from deepvit_train.report.figure import Line, Panel, draw_lines


@pytest.mark.parametrize(
    "x", [[3], [125_000], [125_000, 125_100], [1, 125_100], [0, 1, 2], [1_000_000, 1_300_000]]
)
def test_labels_of_the_steps_do_not_overlap(x: list[int]) -> None:
    y = [0.123456789 + 1e-9 * each for each in range(len(x))]
    panel = Panel("share of blocks", "step", "", [Line("", x, y)])
    figure = draw_lines([panel, panel, panel], "")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axis in figure.axes:
        left, right = axis.get_xlim()
        boxes = [
            label.get_window_extent()
            for place, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)
            if left <= place <= right
        ]
        assert boxes
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes))
        assert not axis.yaxis.get_offset_text().get_text()
    if len(x) == 1:
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [str(x[0])]
