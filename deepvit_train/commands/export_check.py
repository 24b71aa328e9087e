"""Run an exported file by the other program, in a process without this project, and compare.

Shapes: B batch, C classes.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepvit_train.commands import export_reader
from deepvit_train.config.export import ExportConfig, NumberType
from deepvit_train.error import UserError
from deepvit_train.models import DeepViT

TOLERANCE = 1e-4  # of logits in fp32
ROUNDINGS = 4


@dataclass(frozen=True)
class CheckImages:
    """What both programs see.

    Args:
        pixels: normalised images, (images, channels, height, width).
        targets: the output of each image's class, (images,).
        absent: outputs that accuracy leaves out, because the data has no such class.
    """

    pixels: Tensor
    targets: Tensor
    absent: Sequence[int]

    def accuracy(self, logits: Tensor) -> float:
        """Return the share of images whose class has the largest logit, as an evaluation counts it."""
        return (self._first(logits) == self.targets).double().mean().item()

    def agreement(self, logits: Tensor, others: Tensor) -> float:
        """Return the share of images for which both have the same first class."""
        return (self._first(logits) == self._first(others)).double().mean().item()

    def _first(self, logits: Tensor) -> Tensor:
        """Return the first class of each image; -1, which is no class, where logits are not finite."""
        finite = logits.isfinite().all(dim=1)
        masked = logits.clone()
        masked[:, list(self.absent)] = -torch.inf
        return masked.topk(1).indices[:, 0].where(finite, -1)


@dataclass(frozen=True)
class Answers:
    """The logits of one program, (images, C), and how long it took.

    Args:
        program: its name and version.
        seconds: for all images, the first batch run once before.
        alone_differs: how far the logits of the first image, run alone, are from those in its batch.
        rounding: how far the logits of the first batch are from those in float64; 0 where that is not known.
    """

    program: str
    logits: Tensor
    seconds: float
    alone_differs: float = 0.0
    rounding: float = 0.0


def our_answers(model: DeepViT, images: CheckImages, batch_size: int) -> Answers:
    """Run the model as an evaluation does."""
    batches = images.pixels.split(batch_size)
    with torch.no_grad():
        model(batches[0])
        start = time.perf_counter()
        logits = torch.cat([model(batch) for batch in batches])
        seconds = time.perf_counter() - start
        exact = copy.deepcopy(model).double()(batches[0].double())
    rounding = (logits[:batch_size] - exact).abs().max().item()
    return Answers(f"torch {torch.__version__}", logits, seconds, rounding=rounding)


def their_answers(form: str, file: Path, images: CheckImages, batch_size: int, threads: int) -> Answers:
    """Run a file by the program that it is for. Raises UserError with that program's words if it fails."""
    with tempfile.TemporaryDirectory(prefix="deepvit-export-") as folder:
        pixels, logits = Path(folder) / "images.npy", Path(folder) / "logits.npy"
        np.save(pixels, images.pixels.numpy())
        command = [
            sys.executable,
            "-P",
            export_reader.__file__,
            form,
            file,
            pixels,
            logits,
            batch_size,
            threads,
        ]
        # A library reads its number of threads as it is imported.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
        if done.returncode:
            reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise UserError(f"format={form}: the exported file can't be run without this project ({reason})")
        said = json.loads(done.stdout.splitlines()[-1])
        found = torch.from_numpy(np.load(logits))
    return Answers(said["program"], found, said["seconds"], said["alone_differs"])


def compare(ours: Answers, theirs: Answers, images: CheckImages, config: ExportConfig) -> dict[str, Any]:
    """Return the comparison as plain data, for JSON."""
    count, largest = len(images.targets), ours.logits.abs().max().item()
    difference = max((ours.logits - theirs.logits).abs().max().item(), theirs.alone_differs)
    return {
        "images": count,
        "largest_difference": difference,
        "largest_logit": largest,
        "accepted_difference": _accepted(ours, config),
        "rounding": ours.rounding,
        "top1_agreement": images.agreement(ours.logits, theirs.logits),
        "top1": images.accuracy(ours.logits),
        "top1_exported": images.accuracy(theirs.logits),
        "accepted_accuracy_loss": config.accuracy_loss,
        "images_per_s": round(count / ours.seconds, 1),
        "images_per_s_exported": round(count / theirs.seconds, 1),
        "program": ours.program,
        "program_exported": theirs.program,
        "threads": torch.get_num_threads(),
    }


def _accepted(ours: Answers, config: ExportConfig) -> float | None:
    """Return the largest difference that is accepted; None: any.

    In a deep model rounding alone may exceed the tolerance, for each norm over maps makes it larger. Both
    programs round, and the file is compared on more images than the first batch: hence a factor of 4.
    """
    largest = max(1.0, ours.logits.abs().max().item())
    if config.tolerance is not None:
        return config.tolerance * largest
    if config.numbers != NumberType.fp32:
        return None
    return max(TOLERANCE * largest, ROUNDINGS * ours.rounding)


def refuse_if_worse(check: dict[str, Any], out: str) -> None:
    """Raise UserError if the comparison is not accepted."""
    accepted, difference = check["accepted_difference"], check["largest_difference"]
    # Written so that NaN is refused.
    if accepted is not None and not difference <= accepted:
        raise UserError(
            f"out={out}: not written: logits differ by {difference:.2g}, more than {accepted:.2g}\n"
            f"{check['top1_agreement']:.2%} of {check['images']} images have the same first class; "
            f"tolerance={difference * 1.1 / max(1.0, check['largest_logit']):.1g} would accept it"
        )
    before, after = check["top1"], check["top1_exported"]
    if not before - after <= check["accepted_accuracy_loss"]:
        raise UserError(
            f"out={out}: not written: top-1 falls from {before:.4f} to {after:.4f}, by more than "
            f"accuracy_loss={check['accepted_accuracy_loss']:g}"
        )
