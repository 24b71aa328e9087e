"""Say in words what images show, and what a model takes them for, for the pictures of a report."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepvit_train.models.walk import in_evaluation_mode

LONGEST = 24  # letters of a name on a picture


def answers(model: nn.Module, images: Tensor, names: list[str] | None) -> list[str]:
    """Return the likeliest class of each image (B, 3, height, width) with its probability: 'cat (93%)'.

    Args:
        model: gives logits (B, classes).
        images: on the model's device.
        names: of the model's outputs; None where nobody knows them: 'output 281 (93%)'.
    """
    with in_evaluation_mode(model), torch.no_grad():
        shares, outputs = model(images).float().softmax(dim=1).max(dim=1)
    found = [f"output {output}" if names is None else names[output] for output in outputs.tolist()]
    return [f"{fitting(name)} ({share:.0%})" for name, share in zip(found, shares.tolist(), strict=True)]


def fitting(name: str) -> str:
    """Return a name as it fits beside a picture: cut where it is long, without letters that draw nothing."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in name)
    # Matplotlib reads what stands between two dollar signs as a formula.
    shown = shown.replace("$", r"\$")
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
