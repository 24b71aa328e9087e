"""Draw and describe how well the features of each block tell classes apart."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from deepvit_train.console import amount
from deepvit_train.report.figure import Line, Panel, draw_lines

TOKEN_LABELS = {"class_token": "class token", "mean_patch": "mean of the patch tokens"}
CLASSIFIERS = {
    "knn_10": "10 neighbours",
    "knn_20": "20 neighbours",
    "knn_100": "100 neighbours",
    "linear": "linear probe",
}
TOLD = ("linear", "knn_20", "knn_10")  # the first of these that was measured is told in words
STYLES = {"trained": "-", "untrained": "--"}


def draw(depth: dict[str, Any]) -> Figure:
    """Draw the accuracy by block, with a panel for each kind of token. `depth` is that of analysis.json."""
    panels = [
        Panel(
            TOKEN_LABELS[kind],
            "block",
            "accuracy",
            [
                Line(f"{label}, {state}", range(len(measured[name])), measured[name], colour, style)
                for colour, (name, label) in enumerate(CLASSIFIERS.items())
                for state, style in STYLES.items()
                for measured in [depth[state][kind]]
                if name in measured
            ],
            (0.0, 1.02),
        )
        for kind in depth["trained"]
    ]
    images = amount(depth["images"], "image")
    caption = f"{images} of {depth['split']}, classified by {depth['train_images']} of train"
    return draw_lines(panels, caption)


def describe(depth: dict[str, Any]) -> list[str]:
    """Say from which block on features tell classes apart no better, for each kind of token."""
    lines = []
    for kind, measured in depth["trained"].items():
        name = next(name for name in TOLD if name in measured)
        found, best = measured[name], max(measured[name])
        error = math.sqrt(best * (1 - best) / depth["images"])
        enough = next(block for block, share in enumerate(found) if share >= best - error)
        lines.append(
            f"Features of the {TOKEN_LABELS[kind]}, {CLASSIFIERS[name]}: the accuracy is highest at block "
            f"{found.index(best)} ({best:.3f}), and {found[-1]:.3f} at the last block. Block {enough} is the "
            f"first within one standard error ({error:.3f}) of the highest. The highest of the untrained "
            f"model is {max(depth['untrained'][kind][name]):.3f}."
        )
    return lines
