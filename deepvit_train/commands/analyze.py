"""`deepvit-analyze` shows what a model's attention does over its depth, beside the same model untrained."""

from __future__ import annotations

import itertools
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from deepvit_train.atomic import make_folder, remove, write_text
from deepvit_train.collapse.answer import answers
from deepvit_train.collapse.contribution import contributions
from deepvit_train.collapse.evidence import read_findings
from deepvit_train.collapse.gallery import draw_all, take_pictures
from deepvit_train.collapse.measurement import as_data, measure_model, theta_of
from deepvit_train.collapse.report import SECTIONS, write_html
from deepvit_train.collapse.verdict import verdict
from deepvit_train.commands.analyze_features import measure_features
from deepvit_train.commands.analyze_prune import prune
from deepvit_train.commands.analyze_subject import TIMM, Subject, data_of, from_checkpoint, from_timm
from deepvit_train.config.analyze import AnalyzeConfig
from deepvit_train.config.recipe import Precision
from deepvit_train.console import console
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.choice import spread_over_classes
from deepvit_train.data.dataset import Batch
from deepvit_train.data.index import open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.data.transform import denormalise
from deepvit_train.distributed.world import World, choose_device
from deepvit_train.error import ConfigError, OutputError
from deepvit_train.evaluation.accuracy import EvalResult, evaluate
from deepvit_train.evaluation.calibration import calibrate, reattention_norms, using
from deepvit_train.evaluation.loaded import LoadedModel, measure_statistics
from deepvit_train.models import DeepViT
from deepvit_train.report.figure import save, share_axes
from deepvit_train.training.overlap import told_of_overlap

IMAGES_SEED = 0  # the choice of images is the same for every model
PREFIXES = ("", "compare_")  # of the figures of the first model and the second
PICTURES = 4  # images whose attention is shown


def run(config: AnalyzeConfig) -> dict[str, Any]:
    """Measure one model, or two side by side. Writes analysis.json, and on request figures and report.html.

    Returns the content of analysis.json. Raises ConfigError, CheckpointError or DataError if a model or its
    images can't be used, OutputError if the results can't be written.
    """
    world = World(rank=0, size=1, device=choose_device(config.device.value))
    if config.threads:
        torch.set_num_threads(config.threads)

    # The models, and where the results go.
    subjects = _subjects(config)
    out = _out_folder(config, subjects[0])
    data = data_of(subjects[0], config.data)
    loaders = [Loaders(subject.preprocessing, data, world) for subject in subjects]

    # Measure.
    seen = [images_of(config, each, subject.loaded) for subject, each in zip(subjects, loaders, strict=True)]
    analyses = []
    for subject, images, own in zip(subjects, seen, loaders, strict=True):
        console.print(f"analysing {subject.label}")
        for line in subject.loaded.told_preprocessing() if subject.loaded is not None else []:
            console.print(line)
        analyses.append(_analyse(subject, images.batches, config, own))
    analysis = {
        "definition": config.collapse.legend,
        "data": {"name": str(data.name), "root": data.root, "split": data.evaluated},
        "images": sum(len(batch.images) for batch in seen[0].batches),
        "models": analyses,
    }
    write_text(out / "analysis.json", json.dumps(analysis, indent=1) + "\n")
    console.print(f"written: {out / 'analysis.json'}")
    for entry in analyses:
        for line in entry["verdict"]:
            console.print(f"{entry['label']}: {line}")

    # Draw.
    if config.report:
        drawn = [
            _figures(subject, entry, images, config, world)
            for subject, entry, images in zip(subjects, analyses, seen, strict=True)
        ]
        for name in set(drawn[0]).intersection(*drawn[1:]):
            share_axes([figures[name] for figures in drawn])
        files = _save_figures(drawn, out / "figures")
        write_text(out / "report.html", write_html(analysis, files, config.collapse))
        console.print(f"written: {out / 'figures'}\nread: {out / 'report.html'}")
    return analysis


def _subjects(config: AnalyzeConfig) -> list[Subject]:
    def ours(path: str, key: str) -> Subject:
        return from_checkpoint(path, config.weights.value, config.preset, config.said(), key, config.download)

    if config.model is not None:
        found = [from_timm(config.model, config.checkpoint, config.download)]
    else:
        assert config.checkpoint is not None
        found = [ours(config.checkpoint, "checkpoint")]
    if config.compare is not None:
        is_timm = config.compare.startswith(TIMM)
        found.append(from_timm(config.compare, None) if is_timm else ours(config.compare, "compare"))
    if len({subject.label for subject in found}) < len(found):  # runs of one name in two folders
        found = [replace(subject, label=str(subject.home)) for subject in found]
    for key in ("accuracy", "prune"):
        if getattr(config, key) and any(subject.loaded is None for subject in found):
            raise ConfigError(f"{key}=true needs checkpoints of deepvit-train; nearest: {key}=false")
    return found


def _out_folder(config: AnalyzeConfig, subject: Subject) -> Path:
    if config.out is not None:
        out, names = Path(config.out).expanduser(), []
    else:
        assert subject.home is not None
        out, names = subject.home.parent, [subject.home.name, "analysis"]
    try:
        return make_folder(out, *names)
    except OSError as error:
        raise OutputError(f"out={out.joinpath(*names)}: can't be written ({error.strerror})") from None


@dataclass(frozen=True)
class Seen:
    """The images that maps are collected on.

    Args:
        batches: their targets are the model's numbers for their classes. A model of timm says nothing of its
            classes, so there the targets are the data set's numbers.
        classes: the names of the targets.
        outputs: the names of the model's outputs; None where nobody knows them.
    """

    batches: list[Batch]
    classes: list[str]
    outputs: list[str] | None


def images_of(config: AnalyzeConfig, loaders: Loaders, loaded: LoadedModel | None) -> Seen:
    """Load the images that maps are collected on. Every model gets the same choice."""
    data = loaders.data
    index = open_split(data, data.evaluated)
    classes, outputs = index.classes, None
    if loaded is not None:
        index, labels = loaded.labelled(index, data)
        classes = outputs = labels.names
    bad = BadFiles([], data.max_bad, loaders.world, console.print)
    images = loaders.calibration(index, config.collapse.images, config.batch_size, IMAGES_SEED)
    batches = list(bad.watch(images))
    bad.settle()
    return Seen(batches, classes, outputs)


def _analyse(
    subject: Subject, batches: list[Batch], config: AnalyzeConfig, loaders: Loaders
) -> dict[str, Any]:
    """Measure a model. Returns its entry of `models` in analysis.json."""
    world = loaders.world
    depth = measure_features(subject, config, loaders) if config.features else None
    found: dict[str, Any] = {"label": subject.label, **subject.description, "theta": {}}
    for state, model in subject.states(world.device).items():
        with _statistics_of_images(model, batches, world):
            measured = measure_model(model, (batch.images for batch in batches), config.collapse.k)
            labelled = ((batch.images, batch.targets if subject.loaded else None) for batch in batches)
            measured |= contributions(model, labelled)
        found[state] = as_data(measured, config.collapse)
        found["theta"][state] = theta_of(model)
    found["accuracy"] = _accuracy(subject, config, loaders) if config.accuracy else None
    found["depth"] = depth
    if config.prune:
        found["prune"] = _prune(subject, found["trained"]["averages"]["removal"], config, loaders)
    found["verdict"] = verdict(found, config.collapse, read_findings())
    return found


def _figures(
    subject: Subject, entry: dict[str, Any], seen: Seen, config: AnalyzeConfig, world: World
) -> dict[str, Figure]:
    """Draw the figures of one model. Returns them by name."""
    first, pictures = seen.batches[0], {}
    chosen = spread_over_classes(first.targets.cpu().numpy(), min(PICTURES, len(first.targets)))
    images = first.images[torch.from_numpy(chosen).to(first.images.device)]
    classes = [seen.classes[target] for target in first.targets.cpu()[chosen].tolist()]
    for state, model in subject.states(world.device).items():
        with _statistics_of_images(model, seen.batches, world):
            taken = take_pictures(model, images)
            pictures[state] = replace(taken, answers=answers(model, images, seen.outputs))
    shown = denormalise(images, subject.preprocessing)
    return draw_all(entry, config.collapse, shown, classes, pictures)


def _save_figures(drawn: list[dict[str, Figure]], folder: Path) -> list[dict[str, Path]]:
    """Write the figures, and remove those of an earlier report that this one lacks.

    The names of the second model's begin with compare_.
    """
    try:
        make_folder(folder.parent, folder.name)
        written = [
            {name: save(figure, folder, f"{prefix}{name}") for name, figure in figures.items()}
            for prefix, figures in zip(PREFIXES, drawn, strict=False)
        ]
    except OSError as error:
        raise OutputError(f"{folder}: can't be written ({error.strerror})") from None
    kept = {file for files in written for file in files.values()}
    for prefix, (name, *_), kind in itertools.product(PREFIXES, SECTIONS, ("svg", "png")):
        old = folder / f"{prefix}{name}.{kind}"
        if old not in kept and old.is_file():
            remove(old)
    return written


def _statistics_of_images(
    model: nn.Module, batches: list[Batch], world: World
) -> AbstractContextManager[None]:
    """Let re-attention's BatchNorms use the statistics of these images, as in training.

    Running statistics can lag behind the weights of a trained model, and an untrained model has none.
    """
    if not isinstance(model, DeepViT) or not reattention_norms(model):
        return nullcontext()
    return using(model, calibrate(model, batches, Precision.fp32, world))


def _accuracy(subject: Subject, config: AnalyzeConfig, loaders: Loaders) -> dict[str, Any]:
    """Measure top-1 and loss on the whole split, with calibrated statistics and with the running ones."""
    loaded = subject.loaded
    assert loaded is not None
    data, world = loaders.data, loaders.world
    index = open_split(data, data.evaluated)
    index, labels = loaded.labelled(index, data)
    for line in [*labels.lines, *told_of_overlap(loaded.found, data, index)]:
        console.print(line)
    model, batch_size = loaded.model.to(world.device), config.eval_batch_size
    statistics = {"calibrated": loaded.statistics, "running": None}
    if loaded.needs_calibration:
        statistics["calibrated"] = measure_statistics(
            loaded, loaders, batch_size, Precision.fp32, console.print
        )
    found = {}
    for name, values in statistics.items():
        if name == "running" and not reattention_norms(model):
            found[name] = found["calibrated"]  # without such norms both evaluations are the same
            continue
        batches = loaders.evaluation(index, batch_size)
        with using(model, values):
            result = evaluate(model, batches, world, Precision.fp32, len(labels.names), labels.absent)
        found[name] = {"top1": result.top1, "loss": result.loss, "images": result.images}
    return {**found, "labels": labels.summary()}


def _prune(
    subject: Subject, removal: list[float], config: AnalyzeConfig, loaders: Loaders
) -> dict[str, list[float]]:
    """Measure accuracy without the blocks that are missed least. BatchNorms are calibrated after each cut."""
    loaded = subject.loaded
    assert loaded is not None
    data, world = loaders.data, loaders.world
    index, labels = loaded.labelled(open_split(data, data.evaluated), data)
    model, batch_size = loaded.model.to(world.device), config.eval_batch_size

    def measure() -> EvalResult:
        statistics = None
        if reattention_norms(model):
            statistics = measure_statistics(loaded, loaders, batch_size, Precision.fp32, console.print)
        with using(model, statistics):
            batches = loaders.evaluation(index, batch_size)
            return evaluate(model, batches, world, Precision.fp32, len(labels.names), labels.absent)

    return prune(model, removal, measure)
