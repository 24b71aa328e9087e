"""A data set of 12 learnable classes named 0..11, its tar files, and a run on it numbered otherwise."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepvit_train.run.checkpoint import as_json, digest_of
from deepvit_train.run.description import DESCRIPTION

TWELVE = [str(number) for number in range(12)]
# The run that learns them.
LEARN = [
    "data=imagefolder",
    "model=digits",
    "augment=none",
    "model.depth=2",
    "trainer.batch_size=24",
    "trainer.epochs=6",
    "schedule.warmup_epochs=0",
    "optim.lr=0.002",
    "data.workers=0",
    "trainer.threads=1",
]


def write_classes(root: Path, names: Sequence[str], seed: int = 0) -> Path:
    """Write 30 training and 10 validation images of 16 pixels for each class."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (len(names), 4, 4, 3))
    for split, count in (("train", 30), ("val", 10)):
        for name, pattern in zip(names, patterns, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.kron(pattern, np.ones((4, 4, 1))) + rng.normal(0, 10, (16, 16, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{number:02d}.png")
    return root


def pack(root: Path, out: Path) -> Path:
    """Pack both splits of a folder, a tar file each."""
    out.mkdir()
    for split in ("train", "val"):
        with tarfile.open(out / f"{split}.tar", "w") as archive:
            archive.add(root / split, split)
    return out


def classes_of(file: Path) -> list[str]:
    """The class names that a weights file says."""
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()[DESCRIPTION])["classes"]


def reorder(checkpoint: Path, names: list[str]) -> None:
    """Number the classes of a checkpoint otherwise, as a run on folders in that order would have."""
    before = classes_of(checkpoint / "model.safetensors")
    rows = [before.index(name) for name in names]
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        tensors = {
            name: value[rows].clone() if ".head." in f".{name}" and value.ndim else value
            for name, value in load_file(file).items()
        }
        if header:
            content = json.loads(header[DESCRIPTION]) | {"classes": names}
            header = {DESCRIPTION: json.dumps(content, sort_keys=True)}
        save_file(tensors, file, metadata=header)
    state = json.loads((checkpoint / "state.json").read_text())
    state.pop("identity", None)  # versions that numbered them otherwise stored none
    (checkpoint / "state.json").write_text(as_json(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["sha256"] = {name: digest_of(checkpoint / name) for name in manifest["sha256"]}
    (checkpoint / "manifest.json").write_text(as_json(manifest))
