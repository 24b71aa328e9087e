"""Compare optimizers on a folder of images, with a search of equal size for each.

    python -m scripts.compare_optimizers ROOT OUT

ROOT holds train/CLASS and val/CLASS. Each optimizer gets four rates, the usual one times 0.3, 1, 3 and 10,
with each attention. The search trains on nine tenths of train and is judged by the last tenth, so val stays
unseen. The best rate of each is then trained on all of train with three other seeds, and judged by val.

A figure that OUT/results.json holds already is not measured again, so the command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepvit_train.atomic import write_text
from deepvit_train.commands import train
from deepvit_train.commands.study_statistics import interval, paired
from deepvit_train.config.compose import compose_command
from deepvit_train.error import NotFiniteError

USUAL = {"adamw": 1e-3, "lion": 1e-4, "muon": 1e-3, "sgd": 0.1, "schedulefree": 2.5e-3}
FACTORS = (0.3, 1, 3, 10)
ATTENTIONS = ("self", "reattention")
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
STEPS = 400  # of 50 images
RECIPE = [
    "model=digits",
    "model.image_size=28",
    "model.patch_size=7",
    "model.depth=8",
    "augment=none",
    "trainer.batch_size=50",
    "trainer.epochs=1",
    f"trainer.limit_batches={STEPS}",
    "trainer.eval_every_epochs=1",
    "trainer.probe_every_steps=null",
    "trainer.log_every_steps=100",
    "trainer.threads=1",
    "trainer.report=false",
    "schedule.warmup_epochs=0.1",
    "data.workers=0",
]


def accuracy(out: Path, name: str, overrides: list[str]) -> float:
    """Train a cell and return its accuracy, or take the one that was measured before."""
    file = out / "results.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if name not in found:
        folder = out / "runs" / name
        config = compose_command("train", [*RECIPE, *overrides, f"run_dir={folder}"])
        try:
            result = train.run(config)
            # Of schedule-free the averaged weights are evaluated, as deepvit-eval does.
            found[name] = float(result.get("val_ema/top1", result["val/top1"]))
        except NotFiniteError:
            found[name] = 0.0  # it diverged
        shutil.rmtree(folder)
        write_text(file, json.dumps(found, indent=1, sort_keys=True) + "\n")
    return found[name]


def cell(optim: str, attention: str, rate: float, seed: int) -> list[str]:
    """Return what a cell sets beside the recipe."""
    schedule = "constant" if optim == "schedulefree" else "cosine"
    return [
        f"optim={optim}",
        f"attn={attention}",
        f"optim.lr={rate:g}",
        f"schedule={schedule}",
        f"seed={seed}",
    ]


def best_rate(root: str, out: Path, optim: str, attention: str) -> float:
    """Search the rates of an optimizer on a tenth of the training images."""
    found = {}
    for factor in FACTORS:
        rate = USUAL[optim] * factor
        name = f"search-{attention}-{optim}-{rate:g}"
        images = [f"data.root={root}/train", "data.val_share=0.1"]
        found[rate] = accuracy(out, name, [*images, *cell(optim, attention, rate, SEARCH_SEED)])
    return max(found, key=lambda rate: found[rate])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    table = Table("attention", "optimizer", "rate", "seeds", "mean", "95 % interval", "minus adamw")
    for attention in ATTENTIONS:
        first: list[float] = []
        for optim in USUAL:
            rate = best_rate(given.root, given.out, optim, attention)
            found = [
                100
                * accuracy(
                    given.out,
                    f"{attention}-{optim}-{rate:g}-s{seed}",
                    [f"data.root={given.root}", *cell(optim, attention, rate, seed)],
                )
                for seed in SEEDS
            ]
            first = first or found
            low, high = interval(found, 0.95)
            shift = paired([mine - theirs for mine, theirs in zip(found, first, strict=True)])
            table.add_row(
                attention,
                optim,
                f"{rate:g}",
                " ".join(f"{each:.2f}" for each in found),
                f"{statistics.fmean(found):.2f}",
                f"{low:.2f} to {high:.2f}",
                "" if found is first else f"{shift.mean:+.2f} ({shift.low:+.2f} to {shift.high:+.2f})",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
