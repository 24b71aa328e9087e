"""A model back from a checkpoint or a weights file, with all that evaluating it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepvit_train.config.data import DataConfig, DataName
from deepvit_train.config.model import AttentionConfig, ModelConfig
from deepvit_train.config.preset import Architecture, plain_from
from deepvit_train.config.recipe import Precision
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.index import ImageIndex, check_classes, open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.error import CheckpointError, ConfigError, DataError
from deepvit_train.evaluation.calibration import Statistics, calibrate, reattention_norms
from deepvit_train.models import DeepViT
from deepvit_train.models.importer import import_model
from deepvit_train.run import checkpoint


@dataclass(frozen=True)
class LoadedModel:
    """A model with what it was trained on."""

    file: Path
    weights: str  # 'live' or 'ema'
    model: DeepViT
    architecture: Architecture
    classes: list[str] | None  # by number; None where the file doesn't say, and neither where its data is
    data: DataName | None
    data_root: str | None  # where the data set was in training; unknown for a weights file on its own
    seed: int
    calibrate_images: int
    statistics: Statistics | None

    @property
    def needs_calibration(self) -> bool:
        """Whether the model normalises by running statistics, which mislead, and nothing better is stored."""
        return self.statistics is None and self.calibrate_images > 0 and bool(reattention_norms(self.model))

    def data_for(self, given: DataConfig) -> DataConfig:
        """The run's own data, with what was given instead. Raises ConfigError for a folder not known."""
        if given.name is not None:
            return given
        if self.data is None:
            raise ConfigError(
                f"data is not given, and {self.file} does not say: add data=imagefolder data.root="
            )
        return replace(given, name=self.data, root=given.root or self.data_root)

    def at_size(self, image_size: int) -> LoadedModel:
        """For images of another size: positions resampled, statistics over maps to be measured anew.

        Raises ConfigError where the patch does not divide it. The model is changed in place.
        """
        if image_size == self.architecture.model.image_size:
            return self
        self.model.set_input_size(image_size)
        shape = replace(self.architecture.model, image_size=image_size)
        architecture = Architecture(shape, self.architecture.attn)
        return replace(self, architecture=architecture, statistics=None)

    def check_data(self, index: ImageIndex) -> list[str]:
        """The class names. Raises DataError where the data has others than the model, or another number."""
        if self.classes is not None:
            check_classes(index, self.classes)
        elif len(index.classes) != self.model.num_classes:
            raise DataError(
                f"{index.folder}: {len(index.classes)} classes, but the model of {self.file} has "
                f"{self.model.num_classes}"
            )
        return index.classes


def load(path: str, weights: str, preset: str | None = None, **said: Any) -> LoadedModel:
    """The model of a run, checkpoint folder or weights file, of this project or another.

    Args:
        path: what `checkpoint=` was given.
        weights: 'live', 'ema', or 'auto' for the averaged weights where there are any.
        preset, said: what the tensors of another project's file do not show, as `models.load_model` takes it.

    Raises:
        CheckpointError: where it is missing, damaged or does not fit; as `models.load_model`.
    """
    file = checkpoint.find_weights(path, weights)
    imported = import_model(file, preset, weights, said)
    description = imported.source.description or {}
    try:
        return LoadedModel(
            file=file,
            weights=imported.source.weights,
            model=imported.model.float(),
            architecture=imported.architecture,
            classes=[str(name) for name in description.get("classes") or []] or None,
            data=DataName(description["data"]) if description.get("data") else None,
            data_root=_data_root_beside(file),
            seed=int(description.get("seed", 0)),
            calibrate_images=int(description.get("calibrate_images", 0)),
            statistics=checkpoint.calibrated_beside(file),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its description can't be used ({error})") from None


def measure_statistics(
    loaded: LoadedModel,
    loaders: Loaders,
    batch_size: int,
    precision: Precision,
    say: Callable[[str], None],
) -> Statistics:
    """Calibrate a model on the images that its training run calibrates on.

    Raises CheckpointError where there are none, DataError for too many bad ones.
    """
    data, world = loaders.data, loaders.world
    try:
        index = open_split(data, "train")
        check_classes(index, loaded.classes or index.classes)
    except DataError as error:
        raise CheckpointError(
            f"{loaded.file}: holds no calibrated statistics, and there are no training images to measure "
            f"them on ({error}); give data.root=FOLDER with train/, or a checkpoint saved at an evaluation"
        ) from None
    count, bad = loaded.calibrate_images, BadFiles([], data.max_bad, world, say)
    images = loaders.calibration(index, count, batch_size, loaded.seed)
    statistics = calibrate(loaded.model, bad.watch(images), precision, world)
    bad.settle()
    return statistics


def _in_checkpoint(file: Path) -> bool:
    return (file.parent / checkpoint.MANIFEST).exists()


def _data_root_beside(file: Path) -> str | None:
    root = checkpoint.read_state(file.parent).get("data_root") if _in_checkpoint(file) else None
    return None if root is None else str(root)


def result_file(loaded: LoadedModel, name: str) -> Path:
    """Where an evaluation is written: beside the checkpoint's folder, or beside a weights file of its own."""
    subject = loaded.file.parent.resolve() if _in_checkpoint(loaded.file) else loaded.file
    return subject.with_name(f"{subject.name}.{loaded.weights}.{name}.json")


def description_of(
    model: ModelConfig,
    attn: AttentionConfig,
    classes: list[str],
    data: DataConfig,
    seed: int,
    calibrate_images: int,
) -> dict[str, Any]:
    """What a weights file says about its model, for `load`. It names no folder of the machine it was trained
    on: equal runs write equal files wherever they ran.
    """
    return {
        "format": checkpoint.FORMAT,
        "model": plain_from(model) | {"weights": None},
        "attn": plain_from(attn),
        "classes": classes,
        "data": str(data.name),
        "seed": seed,
        "calibrate_images": calibrate_images,
    }
