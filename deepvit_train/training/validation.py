"""Calibrates and then evaluates the live weights, and the averaged ones if there are any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """What an evaluation during training reads.

    Without calibration images, the BatchNorms use their running statistics. `absent` holds the outputs whose
    classes the images lack: they are left out.
    """

    images: Iterable[Batch]
    calibration_images: Iterable[Batch] | None
    precision: Precision
    classes: int
    world: World
    absent: Sequence[int] = ()

    def __call__(self, state: TrainState) -> bool:
        """Evaluate the state and note metrics and statistics in it. Returns whether it is the best so far.

        Metrics are named val/top1 for the live weights and val_ema/top1 for the averaged ones. If there are
        averaged weights, they decide what is best. The other ranks take over the first rank's buffers; apart
        from that, training goes on as if there had been no evaluation.
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
        state.metrics, state.calibrated, state.evaluated_step = metrics, calibrated, state.step
        select = f"val_ema/{SELECT_BY}" if state.ema is not None else f"val/{SELECT_BY}"
        if not state.best or metrics[select] > state.best[select]:
            state.best = {"step": state.step, **metrics}
            return True
        return False
