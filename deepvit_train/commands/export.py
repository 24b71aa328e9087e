"""`deepvit-export` writes a model for other programs, and proves there that it gives the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from deepvit_train import __version__
from deepvit_train.atomic import new_folder, write_text
from deepvit_train.commands.evaluate_result import preprocessing_of
from deepvit_train.commands.export_check import (
    CheckImages,
    compare,
    our_answers,
    refuse_if_worse,
    their_answers,
)
from deepvit_train.commands.export_file import check_onnx, write_onnx, write_pt2
from deepvit_train.commands.export_hub import check_push, complete, send
from deepvit_train.commands.export_timm import check_timm, write_timm
from deepvit_train.config.export import ExportConfig, ExportFormat
from deepvit_train.config.preset import plain_from
from deepvit_train.config.recipe import Precision
from deepvit_train.console import amount, console, print_report
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.label import Labels
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError
from deepvit_train.evaluation.calibration import Statistics, using
from deepvit_train.evaluation.loaded import LoadedModel, load_named, measure_statistics
from deepvit_train.run.checkpoint import digest_of

FILES = {
    ExportFormat.onnx: "model.onnx",
    ExportFormat.pt2: "model.pt2",
    ExportFormat.timm: "model.safetensors",
}


def run(config: ExportConfig) -> dict[str, Any]:
    """Write the file and model.json into a new folder, once the other program has run it.

    The last line on stdout is a JSON object. Raises ConfigError for a model that the format can't hold or a
    package that is missing, UserError if the answers differ by more than is accepted.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.push is not None:
        check_push(config.push, config.out)
    if config.format == ExportFormat.onnx:
        check_onnx()
    loaded = load_named(config)
    if config.format == ExportFormat.timm:
        check_timm(loaded.architecture)
    console.print(f"{loaded.found.file}: {loaded.weights} weights")

    # The images that both programs see, and the statistics that become a part of the file.
    data = loaded.data_for(config.data)
    index, labels = loaded.labelled(open_split(data, data.evaluated), data)
    for line in [*loaded.told_preprocessing(), *labels.lines]:
        console.print(line)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    loaders = Loaders(loaded.architecture.model.preprocessing, data, world)
    statistics = _statistics(loaded, loaders, config)
    images = _check_images(loaders, index, labels, config)

    # The file, and the proof. A folder that is not proved does not stay.
    out = Path(config.out).expanduser()
    report = _description(loaded, labels, config)
    with using(loaded.model, statistics), new_folder(out) as folder:
        file = folder / FILES[config.format]
        _write(loaded, report, config, file)
        report["digests"] = {
            "file": digest_of(file),
            "checkpoint": digest_of(loaded.found.file.resolve()),  # a link, in the hub's cache
            "data": index.digest,
        }
        report["check"] = _check(loaded, images, config, file)
        refuse_if_worse(report["check"], config.out)
        write_text(folder / "model.json", json.dumps(report, indent=1) + "\n")
        if config.push is not None:
            complete(folder, loaded, report, config.push)
    pushed = None if config.push is None else send(out, config.push, config.private)
    _tell(report, out, pushed)
    return report


def _statistics(loaded: LoadedModel, loaders: Loaders, config: ExportConfig) -> Statistics | None:
    """Return the calibrated statistics of the model, measured now if its file has none."""
    if not loaded.needs_calibration:
        return loaded.statistics
    console.print(f"calibrating on {amount(loaded.description.calibrate_images, 'training image')}")
    return measure_statistics(loaded, loaders, config.batch_size, Precision.fp32, console.print)


def _check_images(loaders: Loaders, index: ImageIndex, labels: Labels, config: ExportConfig) -> CheckImages:
    """Load the images of the check, in whole batches. Raises DataError for one that can't be read."""
    batches = None if config.check_images is None else -(-config.check_images // config.batch_size)
    pixels, targets = [], []
    for batch in loaders.evaluation(index, config.batch_size, batches):
        if batch.bad:
            raise DataError(f"{batch.bad[0]}: can't be read, and a check replaces no image")
        pixels.append(batch.images.clone())  # a loader uses the memory of a batch again
        targets.append(batch.targets)
    return CheckImages(torch.cat(pixels), torch.cat(targets), labels.absent)


def _check(loaded: LoadedModel, images: CheckImages, config: ExportConfig, file: Path) -> dict[str, Any]:
    """Run the model here and the file elsewhere, and return the comparison."""
    ours = our_answers(loaded.model, images, config.batch_size)
    subject = file.parent if config.format == ExportFormat.timm else file
    threads = torch.get_num_threads()
    theirs = their_answers(config.format.value, subject, images, config.batch_size, threads)
    return compare(ours, theirs, images, config)


def _description(loaded: LoadedModel, labels: Labels, config: ExportConfig) -> dict[str, Any]:
    """Return what a program must know to use the file: it is in the file's metadata and in model.json."""
    model = loaded.architecture.model
    return {
        "format": config.format.value,
        "numbers": config.numbers.value,
        "file": FILES[config.format],
        "input": {
            "name": "images",
            "shape": ["batch", 3, model.image_size, model.image_size],
            "values": "RGB, float32, (value / 255 - mean) / std",
        },
        "output": {"name": "logits", "shape": ["batch", loaded.model.num_classes]},
        "preprocessing": preprocessing_of(loaded) | {"resized": model.preprocessing.resized},
        "classes": labels.names,
        "model": plain_from(model) | {"weights": None},
        "attn": plain_from(loaded.architecture.attn),
        "weights": loaded.weights,
        "versions": {"deepvit_train": __version__, "torch": torch.__version__},
    }


def _write(loaded: LoadedModel, description: dict[str, Any], config: ExportConfig, file: Path) -> None:
    if config.format == ExportFormat.onnx:
        write_onnx(loaded.model, description, config.numbers, file)
    elif config.format == ExportFormat.pt2:
        write_pt2(loaded.model, description, file)
    else:
        write_timm(loaded.model, loaded.description, description, file)


def _tell(report: dict[str, Any], out: Path, pushed: str | None) -> None:
    check, size = report["check"], (out / report["file"]).stat().st_size
    console.print(
        f"{check['program_exported']} on {amount(check['images'], 'image')}: logits differ by at most "
        f"{check['largest_difference']:.2g}; the same first class for {check['top1_agreement']:.2%}; top-1 "
        f"{check['top1_exported']:.4f}, here {check['top1']:.4f}; {check['images_per_s_exported']} images/s, "
        f"here {check['images_per_s']}"
    )
    console.print(f"written: {out / report['file']} ({size / 1e6:.1f} MB) and {out / 'model.json'}")
    if pushed is not None:
        console.print(f"pushed: {pushed}")
    where = {"out": str(out)} | ({"pushed": pushed} if pushed is not None else {})
    print_report({**where, "format": report["format"], "numbers": report["numbers"], **check})
