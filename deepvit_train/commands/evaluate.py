"""`deepvit-eval` measures what a checkpoint gets right, on its own data or other data of the same classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepvit_train.commands.evaluate_result import Evaluated
from deepvit_train.config.evaluate import EvalConfig
from deepvit_train.console import amount, console
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.layout import layout_warnings
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed import world as distributed
from deepvit_train.error import ConfigError
from deepvit_train.evaluation.accuracy import evaluate
from deepvit_train.evaluation.calibration import Statistics, reattention_norms, using
from deepvit_train.evaluation.loaded import LoadedModel, load_named, measure_statistics
from deepvit_train.evaluation.prediction import Predictions, Recorder
from deepvit_train.training.overlap import told_of_overlap

LARGE = 8  # times as many patches as in training; more than that is seldom meant


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Prints a table, writes a JSON file beside the checkpoint, and on request a report; prints a JSON object as
    the last line.
    """
    if config.suite.name is not None:
        # Imported here, because it needs what is below.
        from deepvit_train.commands.evaluate_suite import run_suite

        return run_suite(config)
    world = distributed.start(config.device.value, config.timeout_s)
    if config.threads:
        torch.set_num_threads(config.threads)
    say = console.print if world.is_main else lambda line: None

    loaded, own_size = load_for(config, say)
    model, preprocessing = loaded.model.to(world.device), loaded.architecture.model.preprocessing

    # The data of the run, unless other data was given.
    data = loaded.data_for(config.data)
    index = open_split(data, data.evaluated)
    warnings = layout_warnings(index)
    left_out = index.told_of_left_out()
    index, labels = loaded.labelled(index, data)
    for line in [
        *([left_out] if left_out else []),
        *labels.lines,
        *(f"warning: {each}" for each in warnings),
        *(told_of_overlap(loaded.found, data, index) if world.is_main else []),
    ]:
        say(line)

    # Calibrate if there are no statistics for these weights at this size, then evaluate.
    loaders = Loaders(preprocessing, data, world)
    statistics = statistics_for(loaded, loaders, config, say)
    batches = loaders.evaluation(index, config.batch_size, config.limit_batches)
    order = loaders.evaluation_order(index, config.batch_size, config.limit_batches)
    recorder = Recorder(order, len(labels.names), world) if config.report else None
    with using(model, statistics):
        result = evaluate(model, batches, world, config.precision, len(labels.names), labels.absent, recorder)
    predictions = None if recorder is None else recorder.gather()

    evaluated = Evaluated(loaded, own_size, config, data, labels, len(index), result)
    report = evaluated.report()
    if world.is_main:
        page = None if predictions is None else partial(_write_page, evaluated, index, predictions)
        evaluated.tell(report, page)
    distributed.stop()
    return report


def _write_page(evaluated: Evaluated, index: ImageIndex, predictions: Predictions) -> Path:
    # Imported where it is needed: matplotlib, scikit-learn and scipy take a second.
    from deepvit_train.commands.evaluate_report import EvaluationReport

    return EvaluationReport(evaluated, index, predictions).write()


def load_for(config: EvalConfig, say: Callable[[str], None]) -> tuple[LoadedModel, int]:
    """Load the model as it is to be evaluated. Returns it, and the image size that its file says, in pixels.

    The checkpoint says what the model is and how its images are prepared; of a foreign file the user does.
    """
    loaded = load_named(config)
    own_size = loaded.architecture.model.image_size
    if config.calibrate_images is not None:
        loaded = loaded.calibrating_on(config.calibrate_images)
    if config.image_size is not None:
        loaded = _at_size(loaded, config.image_size, say)
    say(f"{loaded.found.file}: {loaded.weights} weights")
    for line in loaded.told_preprocessing():
        say(line)
    return loaded, own_size


def statistics_for(
    loaded: LoadedModel, loaders: Loaders, config: EvalConfig, say: Callable[[str], None]
) -> Statistics | None:
    """Return the statistics of the model's BatchNorms, measured now if there are none at this size."""
    if not loaded.needs_calibration:
        return loaded.statistics
    say(
        f"no calibrated statistics for these weights at {loaders.preprocessing.image_size} pixels: "
        f"calibrating on {amount(loaded.description.calibrate_images, 'training image')}"
    )
    return measure_statistics(loaded, loaders, config.batch_size, config.precision, say)


def _at_size(loaded: LoadedModel, image_size: int, say: Callable[[str], None]) -> LoadedModel:
    """Return the model for another image size. Warns where that takes many times as long.

    Raises ConfigError if its statistics would have to be measured anew and that was not asked for.
    """
    before = loaded.architecture.model
    resized = loaded.at_size(image_size)
    grids = [(size // before.patch_size) ** 2 for size in (before.image_size, image_size)]
    if grids[1] > LARGE * grids[0]:
        say(
            f"warning: image_size={image_size}: {grids[1]:,} patches of an image instead of {grids[0]:,}: "
            f"an attention map has {(grids[1] / grids[0]) ** 2:,.0f} weights for one"
        )
    needed = resized is not loaded and bool(reattention_norms(resized.model))
    if needed and not resized.description.calibrate_images:
        raise ConfigError(
            f"image_size={image_size}: the BatchNorm statistics of {loaded.found.file} are those of "
            f"{loaded.architecture.model.image_size} pixels, so add calibrate_images=512"
        )
    return resized
