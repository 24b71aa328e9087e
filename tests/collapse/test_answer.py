"""Check what a report says of its pictures: names and probabilities by hand, and text that can be drawn."""

from __future__ import annotations

import io
import math

import torch
from torch import nn

from deepvit_train.collapse.answer import LONGEST, answers, fitting
from deepvit_train.report.figure import draw_overlays


class Known(nn.Module):
    """Gives the logits 0 and log 3, or log 9 for a bright image, and something else in training mode."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        second = torch.where(images.mean(dim=(1, 2, 3)) > 0.5, math.log(9), -math.log(3))
        return torch.stack([torch.zeros_like(second), second * (1 - 2 * self.training)], dim=1)


def test_answers_are_the_likeliest_class_and_its_probability() -> None:
    model, images = Known().train(), torch.stack([torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    assert answers(model, images, ["ant", "bee"]) == ["bee (90%)", "ant (75%)"]
    assert answers(model, images, None) == ["output 1 (90%)", "output 0 (75%)"]
    assert model.training


def test_any_name_can_be_drawn() -> None:
    for name in ("$x^", "a$\\frac{$b", "tab\there", "long" * 20, "Dünen"):
        shown = fitting(name)
        pixels = torch.zeros(4, 4, 3).numpy()
        figure = draw_overlays([(f"is: {shown}", pixels, [pixels[:2, :2, 0]])], [0], "")
        figure.savefig(io.BytesIO(), format="png")
        assert figure.axes[0].get_title(loc="left") == f"is: {shown}"
    assert len(fitting("long" * 20)) == LONGEST
    assert fitting("tab\there") == "tab?here"


def test_a_caption_fits_the_width_of_its_figure() -> None:
    caption = "weights of the class token over patches (pre-mix, mean of heads); each map has its own scale"
    pixels = torch.zeros(4, 4, 3).numpy()
    for blocks in (1, 8):
        figure = draw_overlays([("", pixels, [pixels[:2, :2, 0]] * blocks)], list(range(blocks)), caption)
        figure.savefig(io.BytesIO(), format="png")
        (written,) = [text for text in figure.texts if caption.split()[0] in text.get_text()]
        assert " ".join(written.get_text().split()) == caption
        box = written.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
