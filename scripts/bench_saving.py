"""What checkpoints every 50 steps cost: images/s of the same run with and without them.

Runs take turns, each a process of its own; the first pair is not counted, the figures are medians.

    python -m scripts.bench_saving --rounds 5 model.depth=12 model.dim=192 model.heads=6
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = ["trainer.threads=1", "data.workers=0", "trainer.calibrate_images=0", "trainer.probe_every_steps=null"]


def images_per_s(steps: int, save_every_steps: str, overrides: list[str]) -> float:
    """Train so many steps in a new folder; the throughput over all of them."""
    with tempfile.TemporaryDirectory() as folder:
        plan = [f"trainer.max_steps={steps}", f"trainer.log_every_steps={steps}", "trainer.epochs=1000"]
        save = [f"trainer.save_every_steps={save_every_steps}", "trainer.eval_every_epochs=1000"]
        command = [sys.executable, "-m", "deepvit_train.cli", "train", *RUN, *plan, *save, *overrides]
        subprocess.run([*command, f"run_dir={folder}/run"], check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
        return next(line["train/images_per_s"] for line in lines if "train/images_per_s" in line)


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {"null": [], "50": []}
    for _ in range(options.rounds + 1):
        for save_every_steps, found in rates.items():
            found.append(images_per_s(options.steps, save_every_steps, options.overrides))
    without, with_saves = (statistics.median(found[1:]) for found in rates.values())
    report = {"images_per_s": rates, "without": without, "with": with_saves, "lost": 1 - with_saves / without}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
