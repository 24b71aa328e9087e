"""Train on two ranks and kill processes every few seconds, then compare with a run that was left alone.

    python -m scripts.soak --minutes 30

Each round trains twice from the same seed: first undisturbed, then with a fault every few seconds. A fault is
SIGKILL to everything at once, to one rank, or to one loader process, and the same command starts again after
it. The script prints a JSON object. Its exit code is 1 if weights, averages, optimizer or statistics of any
round differ by a bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

COMMAND = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "deepvit_train.cli", "train", "trainer.threads=1", "data.workers=1", "trainer.ema_decay=0.99"),
    *("model.dropout=0.1", "trainer.save_every_steps=5", "trainer.log_every_steps=1", "trainer.timeout_s=60"),
]
FAULTS = ("everything", "a rank", "a loader")


def start(folder: Path, epochs: int, seed: int) -> subprocess.Popen[bytes]:
    """Start the training command. Started again, it continues the run."""
    return subprocess.Popen(
        [*COMMAND, f"run_dir={folder}", f"trainer.epochs={epochs}", f"seed={seed}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def children(process: int) -> list[int]:
    """Return the processes that a process started and that still run."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def steps_logged(folder: Path) -> int:
    """Return the number of steps that a run has logged so far."""
    file = folder / "metrics.jsonl"
    return file.read_text().count('"train/loss"') if file.exists() else 0


def inject(fault: str, process: subprocess.Popen[bytes]) -> bool:
    """Kill what the fault names. Returns whether there was such a process."""
    ranks = children(process.pid)
    loaders = [each for rank in ranks for each in children(rank)]
    victims = {"everything": [process.pid, *ranks], "a rank": ranks[:1], "a loader": loaders[:1]}[fault]
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            return False
    return bool(victims)


def disturb(folder: Path, epochs: int, seed: int, rng: random.Random) -> Counter[str]:
    """Train to the end, with a fault a few seconds after each start has logged a step. Returns the faults."""
    done: Counter[str] = Counter()
    while True:
        seen, process = steps_logged(folder), start(folder, epochs, seed)
        while process.poll() is None and steps_logged(folder) <= seen:
            time.sleep(0.05)
        wait = time.monotonic() + rng.uniform(0, 10)
        while process.poll() is None and time.monotonic() < wait:
            time.sleep(0.05)
        if process.poll() is None:
            fault = rng.choice(FAULTS)
            done[fault] += inject(fault, process)
        if process.wait(timeout=300) == 0:
            return done


def outcome(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor file of the last checkpoint."""
    files = sorted((folder / "checkpoints" / "last").glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    """Run rounds until the time is over. The last round is finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--epochs", type=int, default=40, help="of each round")
    options = parser.parse_args()
    began, rng = time.monotonic(), random.Random(0)
    faults: Counter[str] = Counter()
    rounds = differing = 0
    with tempfile.TemporaryDirectory() as scratch:
        while time.monotonic() - began < 60 * options.minutes:
            quiet, loud = (Path(scratch) / f"{kind}{rounds}" for kind in ("quiet", "loud"))
            if start(quiet, options.epochs, rounds).wait() != 0:
                raise SystemExit("the undisturbed run failed")
            faults += disturb(loud, options.epochs, rounds, rng)
            differing += outcome(quiet) != outcome(loud)
            rounds += 1
            print(f"round {rounds}: {dict(faults)}, {differing} differing", file=sys.stderr, flush=True)
    minutes = round((time.monotonic() - began) / 60, 1)
    print(json.dumps({"minutes": minutes, "rounds": rounds, "faults": faults, "differing": differing}))
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    main()
