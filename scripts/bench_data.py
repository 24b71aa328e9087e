"""Measure images/s of the data pipeline beside timm's create_loader, and of JPEG decoders: `make bench-data`.

Both loaders read the same photographs, crop them, resize them to 224 pixels by the same interpolation, and
give normalised float batches, erased for DeiT. They take turns, pass by pass, so that a busy machine slows
both. The figures are medians.

timm's create_loader interpolates bilinearly by default, this project bicubically. For the rotations and
shears of RandAugment timm uses the loader's interpolation, and this project the bilinear one.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import statistics
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.data import ImageDataset, auto_augment, create_loader

from deepvit_train.config.compose import compose_command
from deepvit_train.data.index import scan_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.data.order import TrainOrder
from deepvit_train.distributed.world import World
from scripts.photographs import write_photographs

BATCH = 50
CPU = torch.device("cpu")
RECIPES = {"crop + flip": "basic", "DeiT": "deit"}
DEIT = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}


def ours(root: Path, augment: str, interpolation: str, workers: int) -> Iterable[object]:
    """Return this project's training loader over one epoch."""
    config = compose_command(
        "train",
        [
            "model=deepvit_s",
            f"model.interpolation={interpolation}",
            f"augment={augment}",
            "data=imagefolder",
            f"data.root={root}",
            f"data.workers={workers}",
        ],
    )
    index = scan_split(root, "train", follow_links=False)
    steps = len(index) // BATCH
    order = TrainOrder(
        len(index), batch_size=BATCH, accumulate=1, steps_per_epoch=steps, steps=range(steps), seed=0
    )
    loaders = Loaders(config.model.preprocessing, config.data, World(0, 1, CPU))
    return loaders.train(index, config.augment, order)


def timms(root: Path, augment: str, interpolation: str, workers: int) -> Iterable[object]:
    """Return timm's training loader with the same settings."""
    return create_loader(
        ImageDataset(str(root / "train")),
        input_size=(3, 224, 224),
        batch_size=BATCH,
        is_training=True,
        interpolation=interpolation,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=False,
        device=CPU,
        color_jitter=None,  # pyright: ignore[reportArgumentType] - 0.0 would still draw and convert
        **(DEIT if augment == "deit" else {}),
    )


def medians(passes: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each pass. Passes take turns, and the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, once in passes.items():
            start = time.perf_counter()
            once()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


def compare_loaders(root: Path, images: int, rounds: int, workers: list[int]) -> list[dict[str, object]]:
    """Return a row of results for each number of workers, interpolation and recipe."""
    rows = []
    for count, interpolation, (name, augment) in product(workers, ("bilinear", "bicubic"), RECIPES.items()):
        loaders = {
            "ours": ours(root, augment, interpolation, count),
            "timm": timms(root, augment, interpolation, count),
        }
        seconds = medians({who: partial(deque, loader, 0) for who, loader in loaders.items()}, rounds)
        rows.append(
            {
                "recipe": name,
                "interpolation": interpolation,
                "workers": count,
                "images_per_s": {who: round(images / taken, 1) for who, taken in seconds.items()},
                "ratio": round(seconds["timm"] / seconds["ours"], 2),
            }
        )
    return rows


def decoders(files: list[bytes]) -> dict[str, Callable[[], object]]:
    """Return a pass over the files for each decoder that is installed."""
    tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    found: dict[str, Callable[[], object]] = {
        "simplejpeg": lambda: [simplejpeg.decode_jpeg(data) for data in files],
        "simplejpeg, fast upsampling": lambda: [
            simplejpeg.decode_jpeg(data, fastupsample=True) for data in files
        ],
        "Pillow": lambda: [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files],
    }
    for name, module, each in (
        ("torchcodec", "torchcodec.decoders", lambda codec: [codec.decode_jpeg(data) for data in tensors]),
        ("torchvision", "torchvision.io", lambda codec: [codec.decode_jpeg(data) for data in tensors]),
        ("SPDL", "spdl.io", lambda codec: [codec.to_numpy(codec.load_image(data)) for data in files]),
        ("PyTurboJPEG", "turbojpeg", lambda codec: [codec.TurboJPEG().decode(data) for data in files]),
    ):
        try:
            codec = importlib.import_module(module)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                each(codec)
        except Exception as error:
            print(f"{name}: not measured ({str(error).strip().splitlines()[0][:90]})")
        else:
            found[name] = lambda each=each, codec=codec: each(codec)
    return found


def main() -> None:
    """Measure, print the tables, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--decoders", action="store_true", help="also compare JPEG decoders")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _mend_timm()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "train", options.images)
        report: dict[str, object] = {"images": options.images, "rounds": options.rounds}
        if options.decoders:
            files = [file.read_bytes() for file in sorted(root.rglob("*.jpg"))[:100]]
            seconds = medians(decoders(files), options.rounds)
            report["decoders"] = {name: round(len(files) / taken) for name, taken in seconds.items()}
        report["loaders"] = compare_loaders(root, options.images, options.rounds, options.workers)
    _print(report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _mend_timm() -> None:
    # timm's RandAugment can ask for 0 bits, which fails with Pillow 13. Before, the image became black.
    posterize = auto_augment.posterize

    def mended(image: Image.Image, bits: int, **_: object) -> Image.Image:
        return posterize(image, bits) if bits else Image.new(image.mode, image.size)

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = mended


def _print(report: dict[str, object]) -> None:
    console = Console()
    if "decoders" in report:
        table = Table("decoder", "images/s")
        for name, rate in report["decoders"].items():  # pyright: ignore[reportAttributeAccessIssue]
            table.add_row(name, str(rate))
        console.print(table)
    table = Table("recipe", "interpolation", "workers", "images/s", "timm", "ratio")
    for row in report["loaders"]:  # pyright: ignore[reportGeneralTypeIssues]
        rates = row["images_per_s"]
        what = (row["recipe"], row["interpolation"], str(row["workers"]))
        table.add_row(*what, str(rates["ours"]), str(rates["timm"]), f"{row['ratio']:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
