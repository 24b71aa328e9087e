"""Calibrates and then evaluates the live weights, and the averaged ones if there are any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepvit_train.config.recipe import Precision, SelectBy
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.parallel import gathered
from deepvit_train.distributed.world import World
from deepvit_train.evaluation.accuracy import evaluate, top5_tells
from deepvit_train.evaluation.calibration import calibrate, using
from deepvit_train.training.state import TrainState

COUNTS = ("val/images", "val/of")  # metrics of a partial evaluation alone: images taken, images there are

# What a figure is called in a line, and which one is the best.
FIGURES = {
    SelectBy.top1: ("top-1", "highest"),
    SelectBy.mean_class: ("mean accuracy of classes", "highest"),
    SelectBy.loss: ("loss", "lowest"),
}


@dataclass(frozen=True)
class Validation:
    """What an evaluation during training reads.

    Without calibration images, the BatchNorms use their running statistics.

    Args:
        total: how many images the split has. An evaluation of fewer is partial.
        absent: the outputs whose classes the images lack. They are left out.
        select_by: the figure that says which evaluation is the best.
    """

    images: Iterable[Batch]
    calibration_images: Iterable[Batch] | None
    precision: Precision
    classes: int
    total: int
    world: World
    absent: Sequence[int] = ()
    select_by: SelectBy = SelectBy.top1

    def __call__(self, state: TrainState) -> bool:
        """Evaluate the state and note metrics and statistics in it. Returns whether it is the best so far.

        Metrics are named val/top1 for the live weights and val_ema/top1 for the averaged ones. If there are
        averaged weights, they decide what is best. Partial evaluations are compared among themselves, if
        they took as many images. The other ranks take over the first rank's buffers; apart from that,
        training goes on as if there had been no evaluation.
        """
        metrics: dict[str, float] = {}
        calibrated = {}
        for name, model in state.weights().items():
            with gathered(model) as plain:
                if self.calibration_images is not None:
                    calibrated[name] = calibrate(plain, self.calibration_images, self.precision, self.world)
                with using(plain, calibrated.get(name)):
                    result = evaluate(
                        plain, self.images, self.world, self.precision, self.classes, self.absent
                    )
            prefix = "val" if name == "live" else f"val_{name}"
            metrics |= {f"{prefix}/{key}": value for key, value in result.scalars().items()}
            if result.images < self.total:
                metrics |= dict(zip(COUNTS, (result.images, self.total), strict=True))
        state.metrics, state.calibrated, state.evaluated_step = metrics, calibrated, state.step
        select = f"{'val' if state.ema is None else 'val_ema'}/{self.select_by}"
        if _is_best(metrics, state.best, select):
            state.best, state.worse = {"step": state.step, **metrics}, 0
            return True
        state.worse += 1
        return False


def _is_best(metrics: dict[str, float], best: dict[str, float], select: str) -> bool:
    """Compare an evaluation with the best one: a full one beats any partial one, whatever its figures.

    Of equal figures the one with the lower loss is better, because its probabilities are. If the losses are
    equal too, the earlier evaluation stays the best.
    """
    taken, taken_by_best = ([each.get(name) for name in COUNTS] for each in (metrics, best))
    if best and taken != taken_by_best:
        return best.get(COUNTS[0]) is not None
    return not best or _merit(metrics, select) > _merit(best, select)


def _merit(metrics: dict[str, float], select: str) -> tuple[float, float]:
    """Return the selected figure and the loss as numbers of which the larger ones are better."""
    weights, _, figure = select.partition("/")
    sign = -1 if figure == SelectBy.loss else 1
    found = (sign * metrics.get(select, math.nan), -metrics.get(f"{weights}/loss", math.nan))
    # A best one of an earlier version may lack the figure, and a loss may be NaN: any number is better.
    first, second = (-math.inf if math.isnan(each) else each for each in found)
    return first, second


def phrase_best(best: dict[str, float], select_by: SelectBy) -> str:
    """Return the best evaluation as text: 'step 630, top-1 0.9918, the highest of all evaluations'."""
    averaged = best.get(f"val_ema/{select_by}")
    of, figure = (" of the averaged weights", averaged) if averaged is not None else ("", None)
    figure = best.get(f"val/{select_by}", math.nan) if figure is None else figure
    images, total = (best.get(name) for name in COUNTS)
    partial = "" if images is None else f" (partial: {images:.0f} of {total:.0f} images)"
    name, extreme = FIGURES[select_by]
    return f"step {best['step']:.0f}, {name}{of} {figure:.4f}{partial}, the {extreme} of all evaluations"


def phrase(metrics: dict[str, float], classes: int) -> str:
    """Return metrics as text: 'val/top1 0.8000  val/loss 0.7000', and on how many images if not on all.

    Args:
        classes: of how many they are. Top-5 accuracy is left out where it says nothing.
    """
    hidden = COUNTS if top5_tells(classes) else (*COUNTS, "val/top5", "val_ema/top5")
    shown = {name: value for name, value in metrics.items() if name not in hidden}
    text = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
    images, of = (metrics.get(name) for name in COUNTS)
    return text if images is None else f"{text}  (partial: {images:.0f} of {of:.0f} images)"
