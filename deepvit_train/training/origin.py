"""Where the weights that a run begins with come from. The first of these that there is decides:

1. The run's own folder. The run goes on from its newest whole checkpoint.
2. The checkpoint that `resume=PATH` names. The run goes on from there, in its own new folder.
3. The weights that `model.weights=PATH` names. The run begins at step 0 with them.
4. Nothing. The run begins at step 0 with the weights that its seed drew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deepvit_train.config.train import TrainConfig
from deepvit_train.data.index import ImageIndex, check_classes
from deepvit_train.distributed.world import World
from deepvit_train.error import CheckpointError
from deepvit_train.run.checkpoint import WEIGHT_FILES, find
from deepvit_train.run.description import read_description
from deepvit_train.run.folder import RunFolder
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

    Raises CheckpointError for a checkpoint that is missing, is damaged or can't be resumed from.
    """
    if folder.begun:
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


def resume(
    state: TrainState,
    origin: Origin,
    folder: RunFolder,
    index: ImageIndex,
    world: World,
    say: Callable[[str], None],
) -> Path | None:
    """Restore the state from the checkpoint that applies and return it, or None if there is none.

    The first rank chooses for all, because it alone has locked the folder.

    Raises CheckpointError for a checkpoint that does not fit, DataError if it was trained on other classes.
    """
    chosen = world.first(str(folder.newest(say) or origin.checkpoint or ""))
    if not chosen:
        return None
    checkpoint = Path(chosen)
    description = read_description(checkpoint / f"{WEIGHT_FILES['live']}.safetensors")
    if description is not None and description.classes is not None:
        check_classes(index, description.classes)
    state.restore(checkpoint)
    return checkpoint
