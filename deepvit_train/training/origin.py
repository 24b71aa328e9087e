"""Where the weights that a run begins with come from. The first of these that there is decides:

1. The run's own folder. The run goes on from its newest whole checkpoint.
2. The checkpoint that `resume=PATH` names. The run goes on from there, in its own new folder.
3. The weights that `model.weights=PATH` names. The run begins at step 0 with them.
4. Nothing. The run begins at step 0 with the weights that its seed drew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepvit_train.config.train import TrainConfig
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.label import Labels, labelled
from deepvit_train.distributed.agreement import differing, together, told
from deepvit_train.distributed.world import World
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.run.checkpoint import (
    MANIFEST,
    WEIGHT_FILES,
    checkpoints_in,
    digest_of,
    read_state,
    verify,
)
from deepvit_train.run.description import read_description
from deepvit_train.run.folder import RunFolder
from deepvit_train.run.found import find
from deepvit_train.training.plan import Plan
from deepvit_train.training.state import TrainState


@dataclass(frozen=True)
class Origin:
    """What the configuration names to begin with. Both are None in the first and in the last case.

    Args:
        checkpoint: a verified checkpoint, in the second case.
        weights: the path to initial weights, in the third case.
    """

    checkpoint: Path | None = None
    weights: str | None = None


def find_origin(config: TrainConfig, folder: RunFolder) -> Origin:
    """Decide which of the four cases applies, before the run's folder is made.

    Raises CheckpointError for a checkpoint that is missing, is damaged, is another run's or can't be resumed
    from.
    """
    if folder.begun:
        folder.check_identity()
        return Origin()
    if config.resume not in ("auto", "never"):
        found = find(config.resume, prefer="last", key="resume")
        if found.folder is None:
            raise CheckpointError(
                f"resume={config.resume}: holds weights but no training state; "
                f"nearest: model.weights={config.resume}"
            )
        return Origin(checkpoint=found.folder)
    return Origin(weights=config.model.weights)


def check_length(config: TrainConfig, origin: Origin, plan: Plan) -> None:
    """Raise ConfigError where the checkpoint that `resume=PATH` names leaves this run nothing to train."""
    if origin.checkpoint is None:
        return
    state = read_state(origin.checkpoint)
    step, evaluated = int(state["step"]), state.get("evaluated_step") == state["step"]
    if step > plan.total_steps or (step == plan.total_steps and evaluated):
        longer = f"trainer.epochs={math.ceil((step + 1) / plan.steps_per_epoch)}"
        if config.trainer.max_steps is not None:
            longer += " trainer.max_steps=null"
        raise ConfigError(
            f"resume={config.resume}: is at step {step} already, and this run ends at step "
            f"{plan.total_steps}; nearest: {longer}"
        )


def open_splits(
    config: TrainConfig, origin: Origin, folder: RunFolder, say: Callable[[str], None]
) -> tuple[ImageIndex, ImageIndex, Labels]:
    """Open the training and the validation images, with the numbers that the model has for their classes.

    The model is the one that the run goes on with, or a new one, which numbers the classes of train. Returns
    also how the validation images were labelled. Raises DataError if classes do not match.
    """
    train, val = (
        open_split(config.data, split, is_for_training=True) for split in ("train", config.data.evaluated)
    )
    names = _classes_of(origin, folder, train.classes)
    owner = "those of train" if names == train.classes else "those of the run's checkpoint"
    train, of_train = labelled(train, names, config.data, owner)
    val, of_val = labelled(val, names, config.data, owner)
    if of_train.absent:
        say(f"{train.title}: lacks {len(of_train.absent)} of the model's {len(names)} classes")
    for line in [*of_train.notes, *of_val.lines]:
        say(line)
    return train, val, of_val


def _classes_of(origin: Origin, folder: RunFolder, expected: list[str]) -> list[str]:
    """Return the names of the outputs of the model that a run goes on with, or those expected of a new one.

    A checkpoint that names others than expected is verified before it is believed.
    """
    candidates = reversed(checkpoints_in(folder.checkpoints))
    for checkpoint in [origin.checkpoint] if origin.checkpoint is not None else candidates:
        try:
            description = read_description(checkpoint / f"{WEIGHT_FILES['live']}.safetensors")
            if description is None or description.classes is None:
                return expected
            if description.classes != expected:
                verify(checkpoint)
        except CheckpointError:
            continue  # what is done about a damaged checkpoint is decided where it is restored
        return description.classes
    return expected


def resume(
    state: TrainState, origin: Origin, folder: RunFolder, world: World, say: Callable[[str], None]
) -> Path | None:
    """Restore the state from the checkpoint that applies and return it, or None if there is none.

    The first rank chooses for all, because it alone has locked the folder.

    Raises CheckpointError for a checkpoint that does not fit, or is not the same file on all ranks.
    """
    newest = together(world, lambda: folder.newest(say))
    chosen = world.first(str(newest or origin.checkpoint or ""))
    if not chosen:
        return None
    checkpoint = Path(chosen)
    digest = together(world, lambda: digest_of(checkpoint / MANIFEST))
    if odd := differing(world, {str(checkpoint): digest}):
        raise CheckpointError(f"{checkpoint}: is another one on each rank; {told('SHA-256', *odd.values())}")
    together(world, lambda: state.restore(checkpoint))
    return checkpoint
