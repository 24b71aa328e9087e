"""`deepvit-eval suite=` evaluates a model on one set after the other, and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from deepvit_train.commands.evaluate import load_for, statistics_for
from deepvit_train.commands.evaluate_suite_part import Part, parts_of
from deepvit_train.commands.evaluate_suite_result import SuiteFile, tell
from deepvit_train.config.data import DataConfig
from deepvit_train.config.evaluate import EvalConfig
from deepvit_train.console import amount, console
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.label import Labels
from deepvit_train.data.loader import Loader
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed import world as distributed
from deepvit_train.distributed.world import World
from deepvit_train.error import DataError
from deepvit_train.evaluation.accuracy import evaluate
from deepvit_train.evaluation.calibration import using
from deepvit_train.evaluation.loaded import LoadedModel
from deepvit_train.evaluation.real_label import evaluate_real, real_labels
from deepvit_train.training.overlap import told_of_overlap


def run_suite(config: EvalConfig) -> dict[str, Any]:
    """Evaluate a checkpoint on every set of a suite that is there.

    A JSON file beside the checkpoint gets each result as soon as it is known, and a set whose result is in it
    is not evaluated again. Prints a table, and a JSON object as the last line. Raises ConfigError if the
    model's classes are not the suite's, DataError if no set is there.
    """
    world = distributed.start(config.device.value, config.timeout_s)
    if config.threads:
        torch.set_num_threads(config.threads)
    say: Callable[[str], None] = console.print if world.is_main else lambda line: None
    loaded, own_size = load_for(config, say)
    loaded.model.to(world.device)
    has_data = config.data.name is not None or loaded.description.data is not None
    data = loaded.data_for(config.data) if has_data or config.suite.needs_data else config.data
    parts, skipped = parts_of(config.suite, loaded, data)

    file = SuiteFile.of(loaded, config, own_size)
    before = world.first(file.read(say) if world.is_main else {})
    suite, results = Suite(config, loaded, data, world), {}
    statistics = statistics_for(loaded, suite.loaders, config, say)
    with using(loaded.model, statistics):
        for part in parts:
            try:
                index, labels = suite.open(part)
                identity = suite.identity(part, index)
                if part.name in before and before[part.name]["of"] == identity:
                    results[part.name] = before[part.name]
                    say(f"{part.name}: evaluated before")
                    continue
                result = suite.evaluate(part, index, labels)
                results[part.name] = result | {"of": identity}
                say(f"{part.name}: top-1 {result['top1']:.4f} on {amount(result['images'], 'image')}")
            except DataError as error:
                skipped[part.name] = str(error).splitlines()[0]
                say(f"{part.name}: left out ({skipped[part.name]})")
                continue
            if world.is_main:
                file.write(before | results)
    if not results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise DataError(f"suite={config.suite.name}: no set is there ({reasons})")
    report = tell(config, loaded, file, results, skipped, world.is_main)
    distributed.stop()
    return report


@dataclass(frozen=True)
class Suite:
    """Opens and evaluates the parts of a suite with one model."""

    config: EvalConfig
    loaded: LoadedModel
    data: DataConfig
    world: World

    @property
    def loaders(self) -> Loaders:
        """The loaders of images as the model expects them."""
        return Loaders(self.loaded.architecture.model.preprocessing, self.data, self.world)

    def open(self, part: Part) -> tuple[ImageIndex, Labels]:
        """List the images of a part. Raises DataError on all ranks if one of them can't."""
        problem, found = set(), None
        try:
            found = part.open()
        except DataError as error:
            problem = {str(error)}
        if problems := sorted(self.world.union(problem)):
            raise DataError(problems[0])
        assert found is not None
        if part.corrupted is None and not part.by_real and self.world.is_main:
            for line in told_of_overlap(self.loaded.found, self.data, found[0]):
                console.print(line)
        return found

    def identity(self, part: Part, index: ImageIndex) -> dict[str, Any]:
        """Return what the result of a part is about: a result of something else is not taken for it."""
        digest = index.digest or hashlib.blake2b(index.paths.data, digest_size=16).hexdigest()
        identity = {"folder": str(index.folder.resolve()), "images": digest, "count": len(index)}
        return identity | ({"seed": self.config.suite.seed} if part.corrupted else {})

    def evaluate(self, part: Part, index: ImageIndex, labels: Labels) -> dict[str, Any]:
        """Evaluate a part. Raises DataError if an image can't be read."""
        config, model, loaders = self.config, self.loaded.model, self.loaders
        if part.by_real:
            known = real_labels([index.path(image) for image in range(len(index))])
            batches = loaders.prediction(index, config.batch_size, config.limit_batches)
            real = evaluate_real(model, batches, known, labels.names, self.world, config.precision)
            return {
                "top1": real.top1,
                "top5": real.top5,
                "images": real.images,
                "unlabelled": real.unlabelled,
            }
        result = evaluate(
            model,
            self._batches(part, index),
            self.world,
            config.precision,
            len(labels.names),
            labels.absent,
        )
        return {
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss if math.isfinite(result.loss) else None,
            "images": result.images,
            "not_finite": result.not_finite,
            "labels": labels.summary(),
        }

    def _batches(self, part: Part, index: ImageIndex) -> Loader:
        config, loaders = self.config, self.loaders
        if part.corrupted is not None:
            seed = config.suite.seed
            return loaders.corrupted(index, *part.corrupted, seed, config.batch_size, config.limit_batches)
        if part.whole:
            loaders = replace(loaders, preprocessing=replace(loaders.preprocessing, crop_pct=1.0))
        return loaders.evaluation(index, config.batch_size, config.limit_batches)
