"""Calibrate, then evaluate: for the live weights, and for the averaged ones where there are any."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deepvit_train.config.recipe import Precision
from deepvit_train.data.dataset import Batch
from deepvit_train.distributed.parallel import gathered
from deepvit_train.distributed.world import World
from deepvit_train.evaluation.accuracy import evaluate
from deepvit_train.evaluation.calibration import calibrate, using
from deepvit_train.training.state import TrainState

SELECT_BY = "top1"


@dataclass(frozen=True)
class Validation:
    """What an evaluation during training reads. Without calibration images, running statistics are used."""

    images: Iterable[Batch]
    calibration_images: Iterable[Batch] | None
    precision: Precision
    classes: int
    world: World

    def __call__(self, state: TrainState) -> bool:
        """Evaluate the state and note metrics and statistics in it. Returns whether it is the best so far.

        Metrics are named val/top1 for the live weights and val_ema/top1 for the averaged ones, which decide
        where there are any. The training state itself stays as it is, but for the buffers of ranks other than
        the first, which become the first rank's.
        """
        metrics: dict[str, float] = {}
        calibrated = {}
        for name, model in state.weights().items():
            with gathered(model) as plain:
                if self.calibration_images is not None:
                    calibrated[name] = calibrate(plain, self.calibration_images, self.precision, self.world)
                with using(plain, calibrated.get(name)):
                    result = evaluate(plain, self.images, self.world, self.precision, self.classes)
            prefix = "val" if name == "live" else f"val_{name}"
            metrics |= {f"{prefix}/{key}": value for key, value in result.scalars().items()}
        state.metrics, state.calibrated, state.evaluated_step = metrics, calibrated, state.step
        select = f"val_ema/{SELECT_BY}" if state.ema is not None else f"val/{SELECT_BY}"
        if not state.best or metrics[select] > state.best[select]:
            state.best = {"step": state.step, **metrics}
            return True
        return False
