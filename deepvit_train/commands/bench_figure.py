"""Draw the figure of a benchmark in which one key of the model varies."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from deepvit_train.atomic import replacing
from deepvit_train.console import amount

# Fields of a row, and the names of their axes.
PANELS = {
    "train_ms": "training step, ms",
    "infer_ms": "inference, ms",
    "saved_mib_per_image": "saved for backward, MiB an image",
}


def plot(report: dict[str, Any], file: Path) -> None:
    """Draw time to train, time to infer and saved memory over the values of the varied key."""
    config = report["config"]
    figure = Figure(figsize=(12.0, 4.0), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for contender in config["contenders"]:
            rows = [row for row in report["rows"] if row["contender"] == contender]
            axes.plot([row["value"] for row in rows], [row[key] for row in rows], "o-", label=contender)
        axes.set(xscale="log", yscale="log", xlabel=config["vary"], ylabel=label)
        axes.set_xticks(config["values"], [str(value) for value in config["values"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    threads = amount(report["machine"]["threads"], "thread")
    title = f"batch {config['batch_size']}, {config['precision']}, {threads}"
    figure.suptitle(f"{title}, medians of {config['repeats']}")
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(drawn := io.BytesIO(), format=file.suffix.removeprefix("."))
    with replacing(file) as opened:
        opened.write(drawn.getvalue())
