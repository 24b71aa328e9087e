"""Measure time and memory of the index of a large data set: python -m scripts.bench_index [--files 1300000]

It makes empty files in a thousand class folders, and measures two starts in fresh processes. The first one
lists the files, and the second one finds the kept index. Each also measures the memory that one more loader
process takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CLASSES = 1000


def make_files(root: Path, files: int) -> None:
    """Write empty files root/train/n00000000/n00000000_0.JPEG and so on."""
    for number in range(CLASSES):
        folder = root / "train" / f"n{number:08d}"
        folder.mkdir(parents=True)
        for place in range(files // CLASSES):
            (folder / f"n{number:08d}_{place}.JPEG").touch()


def start(root: Path) -> dict[str, float]:
    """Return the seconds and MiB of one start, and the MiB of a forked process that reads every path."""
    from deepvit_train.data.index import scan_split

    before, begun = memory_mib("Pss"), time.perf_counter()
    index = scan_split(root, "train", follow_links=False)
    seconds = time.perf_counter() - begun
    result = {"seconds": round(seconds, 2), "mib": round(memory_mib("Pss") - before, 1), "files": len(index)}
    reading, writing = os.pipe()
    if not os.fork():
        fresh = memory_mib("Private_Dirty")
        for image in range(len(index)):
            index.path(image)
        os.write(writing, f"{memory_mib('Private_Dirty') - fresh:.1f}".encode())
        os._exit(0)
    return {**result, "mib_of_a_reader": float(os.read(reading, 100))}


def memory_mib(kind: str) -> float:
    """Return this process's memory of a kind, such as Pss, in MiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


def main() -> None:
    """Make the files, start twice, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1_300_000)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_files(root, options.files)
        time.sleep(3)  # the index of folders that have just changed is not kept
        environment = os.environ | {"XDG_CACHE_HOME": str(root / "cache")}
        for name in ("first start", "second start"):
            command = [sys.executable, "-m", "scripts.bench_index", "--start", str(root)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(name, done.stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
