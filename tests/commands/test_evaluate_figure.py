"""The figures of an evaluation show the numbers that they are drawn from."""

from __future__ import annotations

import pytest
from matplotlib.patches import Rectangle

from deepvit_train.commands.evaluate_figure import IN_BARS, draw_classes
from deepvit_train.evaluation.metric import ClassFigures


def bars(figures: list[ClassFigures]) -> list[list[Rectangle]]:
    """Return the bars of each series."""
    (axis,) = draw_classes([f"class {number}" for number in range(len(figures))], figures).axes
    return [list(each) for each in axis.containers]


def test_few_classes_have_a_bar_each() -> None:
    figures = [
        ClassFigures(1.0, 0.5, 2 / 3, 4),
        ClassFigures(0.25, 1.0, 0.4, 2),
        ClassFigures(None, None, None, 0),
    ]
    precision, recall = bars(figures)
    assert [bar.get_width() for bar in precision] == [1.0, 0.25, 0.0]
    assert [bar.get_width() for bar in recall] == [0.5, 1.0, 0.0]
    (axis,) = draw_classes(["cat", "dog", "$x_1$"], figures).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cat", "dog", "$x_1$"]
    assert [text.get_text() for text in axis.texts].count("not known") == 2


@pytest.mark.parametrize(("classes", "counted"), [(IN_BARS, False), (IN_BARS + 1, True)])
def test_many_classes_are_counted(classes: int, counted: bool) -> None:
    recall, precision = bars([ClassFigures(1.0, 0.5, 2 / 3, 4)] * classes)
    if counted:
        assert [bar.get_height() for bar in recall] == [0] * 10 + [classes] + [0] * 9
        assert [bar.get_height() for bar in precision] == [0] * 19 + [classes]
    else:
        assert len(recall) == len(precision) == classes
