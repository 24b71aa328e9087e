"""Measure what a checkpoint every 50 steps costs.

    python -m scripts.bench_saving model.depth=12 model.dim=192 model.heads=6 trainer.batch_size=16

It compares the steps during and after a save with the later steps up to the next save. Both come from one
run, because from run to run a machine changes its speed by more than a save costs. A save falls between two
steps, and its time counts for the first of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.training import loop

PERIOD = 50
AFTER = 10  # steps that may be slower because a checkpoint is being written beside them
RUN = [
    "trainer.threads=1",
    "data.workers=0",
    "trainer.calibrate_images=0",
    "trainer.probe_every_steps=null",
    "trainer.ema_decay=0.999",
    "trainer.epochs=1000",
    "trainer.eval_every_epochs=1000",
]


def starts_of_steps(periods: int, overrides: list[str], folder: Path) -> list[float]:
    """Train with a save every 50 steps. Returns the time at which each step begins, seconds."""
    starts: list[float] = []
    step = loop.train_step

    def timed(*arguments: object) -> object:
        starts.append(time.perf_counter())
        return step(*arguments)  # pyright: ignore[reportArgumentType]

    loop.train_step = timed  # pyright: ignore[reportAttributeAccessIssue]
    plan = [f"trainer.max_steps={(periods + 1) * PERIOD + 1}", f"trainer.save_every_steps={PERIOD}"]
    train.run(compose_command("train", [*RUN, *plan, *overrides, f"run_dir={folder}/run"]))
    return starts


def main() -> None:
    """Measure, and print one JSON object. `lost` is the share of the time that saves take."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--periods", type=int, default=12)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        starts = starts_of_steps(options.periods, options.overrides, Path(folder))
        last = Path(folder) / "run" / "checkpoints" / "last"
        size = sum(file.stat().st_size for file in last.iterdir())
    lost, seconds = [], []
    for period in range(1, options.periods + 1):
        # A save follows the last step of a period, and delays the first step of the next one.
        taken = [starts[i + 1] - starts[i] for i in range(period * PERIOD - 1, (period + 1) * PERIOD - 1)]
        extra = sum(taken[:AFTER]) - AFTER * statistics.mean(taken[AFTER:])
        lost.append(extra / sum(taken))
        seconds.append(extra)
    report = {
        "checkpoint_mib": round(size / 2**20, 1),
        "step_ms": round(1e3 * (starts[-1] - starts[PERIOD]) / (len(starts) - 1 - PERIOD), 1),
        "save_ms": round(1e3 * statistics.mean(seconds), 1),
        "lost": round(statistics.mean(lost), 4),
        "standard_error": round(statistics.stdev(lost) / len(lost) ** 0.5, 4),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
