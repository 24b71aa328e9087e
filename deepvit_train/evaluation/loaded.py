"""Loads a model back from a checkpoint or a weights file, with all that its evaluation needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from deepvit_train.classes import TORCHVISION
from deepvit_train.config.data import OF_DATA_SET, DataConfig, absolute
from deepvit_train.config.foreign import Weights
from deepvit_train.config.preset import Architecture
from deepvit_train.config.recipe import Precision
from deepvit_train.data.bad_files import BadFiles
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.label import Labels, labelled
from deepvit_train.data.loaders import Loaders
from deepvit_train.error import CheckpointError, ConfigError, DataError
from deepvit_train.evaluation.beside import read_beside
from deepvit_train.evaluation.calibration import Statistics, calibrate, reattention_norms
from deepvit_train.evaluation.outputs import Outputs
from deepvit_train.models import DeepViT
from deepvit_train.models.importer import Imported, import_model, left_out_note
from deepvit_train.run.description import ModelDescription, is_described
from deepvit_train.run.found import Found, find

UNSHOWN = ("mean", "std", "crop_pct", "interpolation")  # what no tensor shows of a model's preprocessing


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what is known about its training.

    Args:
        found: the file that the weights came from, with its checkpoint and its run.
        weights: 'live' or 'ema'.
        model: in evaluation mode, in single precision.
        description: what the model was trained on. A file of another program doesn't say.
        statistics: the calibrated statistics of its BatchNorms, or None if there are none.
        described: whether the file says what its model is, as those of this project do.
        assumed: the parts of its preprocessing that neither its file nor the caller says.
        left_out: names of the file's tensors that the model has no use for.
    """

    found: Found
    weights: str
    model: DeepViT
    description: ModelDescription
    statistics: Statistics | None
    described: bool
    assumed: list[str]
    left_out: list[str]

    @property
    def architecture(self) -> Architecture:
        """The architecture that the model was built from."""
        return self.description.architecture

    @property
    def needs_calibration(self) -> bool:
        """Whether better statistics can be measured than the running ones, which mislead."""
        can_be_measured = self.description.calibrate_images > 0
        return self.statistics is None and can_be_measured and bool(reattention_norms(self.model))

    def told_preprocessing(self) -> list[str]:
        """Return a line on how images reach the model, for a foreign file, which does not say it."""
        if self.described:
            return []
        shape = self.architecture.model
        assumed = f"; assumed, as nobody said it: {', '.join(self.assumed)}" if self.assumed else ""
        return [
            *([left_out_note(self.left_out)] if self.left_out else []),
            f"preprocessing: {shape.image_size} pixels, mean={shape.mean} std={shape.std} "
            f"crop_pct={shape.crop_pct:g} interpolation={shape.interpolation}{assumed}",
        ]

    def data_for(self, given: DataConfig) -> DataConfig:
        """Return the data that was given, or else the data of the model's own run.

        Values of more than 8 bits are read as they were in training, and the split that is evaluated is the
        one that the run evaluated, unless the user says otherwise.

        Raises ConfigError if no data was given and the file does not name any.
        """
        given = replace(given, value_range=given.value_range or self.description.value_range)
        if given.split is None and given.val_share is None:
            given = replace(given, split=self.found.split())
        if given.name is not None:
            return self._split_alike(given)
        if self.description.data is None:
            raise ConfigError(
                f"data is not given, and {self.found.file} does not say: add data=imagefolder data.root="
            )
        if given.root is not None:
            return self._split_alike(replace(given, name=self.description.data))
        data = replace(
            given,
            name=self.description.data,
            root=self.found.data_path("data_root"),
            class_map=given.class_map or self.found.data_path("class_map"),
        )
        return self._split_alike(data)

    def _split_alike(self, data: DataConfig) -> DataConfig:
        """Return the data with what the run said of which images its folder's splits consist of.

        Raises ConfigError where something else is said of the run's own folder, or of one that its training
        images lie in: they would be among those of val.
        """
        kept = self.found.data_keys()
        if absolute(data.root) != self.found.data_path("data_root"):
            self._refuse_training_folder(data, kept)
            return data
        keys = {key: kept[key] for key in OF_DATA_SET if key in kept}
        if data.classes is not None:
            del keys["classes"]
        for key in [key for key in ("val_share", "group_by") if key in keys]:
            said, before = getattr(data, key), keys[key]
            if said not in (None, before):
                raise ConfigError(
                    f"data.{key}={said}: the run split {data.root} otherwise, so training images would be "
                    f"among those of val; nearest: data.{key}={'null' if before is None else before}"
                )
        return replace(data, **keys)

    def _refuse_training_folder(self, data: DataConfig, kept: dict[str, Any]) -> None:
        """Raise ConfigError where one folder is to be split that the run's training images lie in."""
        own, root = self.found.data_path("data_root"), absolute(data.root)
        if data.val_share is None or own is None or root is None:
            return
        if (kept.get("val_share"), kept.get("group_by")) == (data.val_share, data.group_by):
            return  # the same hash: the folder may have been moved
        trained = Path(own) if kept.get("val_share") is not None else (Path(own) / "train").resolve()
        if trained.is_relative_to(root) or Path(root).is_relative_to(trained):
            raise ConfigError(
                f"data.root={data.root} data.val_share={data.val_share}: the run was trained on the images "
                f"of {trained}, so they would be among those of val\n"
                "without both keys the command reads the split that the run evaluated"
            )

    def calibrating_on(self, images: int) -> LoadedModel:
        """Return the model without its statistics, to be calibrated on this number of training images."""
        description = replace(self.description, calibrate_images=images)
        return replace(self, description=description, statistics=None)

    def at_size(self, image_size: int) -> LoadedModel:
        """Return the model for images of another size, in pixels. The model is changed in place.

        Its position embeddings are resampled. Its statistics are dropped, because larger maps have others.
        Raises ConfigError if the patch size does not divide the image size.
        """
        shape, attn = self.architecture.model, self.architecture.attn
        if image_size == shape.image_size:
            return self
        self.model.set_input_size(image_size)
        architecture = Architecture(replace(shape, image_size=image_size), attn)
        description = replace(self.description, architecture=architecture)
        return replace(self, description=description, statistics=None)

    def labelled(self, index: ImageIndex, data: DataConfig) -> tuple[ImageIndex, Labels]:
        """Return a split with the model's numbers for its classes, and how they were matched.

        `Outputs.labelled` says how. Raises DataError if they can't be matched.
        """
        outputs = Outputs(
            count=self.model.num_classes,
            names=self.description.classes,
            order=self.description.class_order or TORCHVISION,
            file=str(self.found.file),
        )
        return outputs.labelled(index, data)


def load(
    path: str,
    weights: str,
    preset: str | None = None,
    key: str = "checkpoint",
    download: bool = False,
    **said: Any,
) -> LoadedModel:
    """Load the model of a run, a checkpoint or a weights file, of this project or another.

    Args:
        path: as `checkpoint=` was given, or `key`, the key that a message is to name.
        weights: 'live', 'ema', or 'auto' for the averaged weights if there are any.
        preset, said: what the tensors of another project's file do not show, as in `models.load_model`. What
            is not said is taken from timm's config.json beside the file, if there is no preset.
        download: whether hf:ORG/NAME is fetched where it is not in the hub's cache.

    Raises CheckpointError if the file is missing, is damaged or does not fit, as `models.load_model` does.
    """
    found = find(path, weights, key=key, download=download)
    imported, said = import_found(found, preset, weights, said)
    model = imported.model.float()
    unsaid = [] if imported.described or preset is not None else list(UNSHOWN)
    return LoadedModel(
        found=found,
        weights=imported.weights,
        model=model,
        description=imported.description,
        statistics=found.calibrated(model),
        described=imported.described,
        assumed=[name for name in unsaid if said.get(name) is None],
        left_out=imported.left_out,
    )


def import_found(
    found: Found, preset: str | None, weights: str, said: dict[str, Any]
) -> tuple[Imported, dict[str, Any]]:
    """Import a weights file with what the caller says, and for the rest what config.json beside it says.

    Returns also both together. The file's own description comes before config.json. Raises as `load` does.
    """
    if preset is not None or is_described(found.file):
        return import_model(found, preset, weights, said), said
    beside = read_beside(found.file)
    said = beside.choices | said
    imported = import_model(found, preset, weights, said)
    names = beside.classes
    if names is None or "classes" in said or len(names) != imported.model.num_classes:
        return imported, said
    imported.model.class_names = names
    return replace(imported, description=replace(imported.description, classes=names, class_order=None)), said


class Naming(Protocol):
    """The keys by which a command names a model and what its file does not say."""

    checkpoint: str
    weights: Weights
    preset: str | None
    download: bool

    def said(self) -> dict[str, Any]: ...


def load_named(config: Naming) -> LoadedModel:
    """Load the model that a command's configuration names. Raises as `load` does."""
    return load(
        config.checkpoint, config.weights.value, config.preset, download=config.download, **config.said()
    )


def measure_statistics(
    loaded: LoadedModel,
    loaders: Loaders,
    batch_size: int,
    precision: Precision,
    say: Callable[[str], None],
) -> Statistics:
    """Calibrate a model on the images that its training run calibrated on.

    Raises CheckpointError if there are no such images, DataError if too many of them are bad.
    """
    data, world = loaders.data, loaders.world
    try:
        index = open_split(data, "train")
        labelled(index, loaded.description.classes or index.classes, data)
    except DataError as error:
        raise CheckpointError(
            f"{loaded.found.file}: holds no calibrated statistics, and there are no training images to "
            f"measure them on ({error}); give data.root=FOLDER with train/, or a checkpoint saved at an "
            "evaluation"
        ) from None
    count, bad = loaded.description.calibrate_images, BadFiles([], data.max_bad, world, say)
    images = loaders.calibration(index, count, batch_size, loaded.description.seed)
    statistics = calibrate(loaded.model, bad.watch(images), precision, world)
    bad.settle()
    return statistics
