"""Which sets a suite has, and what is listed of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from deepvit_train.config.data import DataConfig
from deepvit_train.config.suite import SuiteConfig, SuiteName
from deepvit_train.data.imagenet import find_corrupted, imagenet_classes, known_part, open_folder
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.data.label import Labels, labelled
from deepvit_train.error import ConfigError, DataError
from deepvit_train.evaluation.loaded import LoadedModel

NOT_GIVEN = "no folder is given"


@dataclass(frozen=True)
class Part:
    """One evaluation of a suite.

    Args:
        name: 'v2', or with corruption and severity 'c/gaussian_noise/3'.
        open: lists the images, and says how their classes were matched to the model's. Raises DataError where
            the set is not there.
        by_real: whether the labels are ReaL's.
        whole: whether images are taken whole, because they were cropped when the set was made.
        corrupted: corruption and severity, for images that are corrupted while they are read.
    """

    name: str
    open: Callable[[], tuple[ImageIndex, Labels]]
    by_real: bool = False
    whole: bool = False
    corrupted: tuple[str, int] | None = None


def parts_of(suite: SuiteConfig, loaded: LoadedModel, data: DataConfig) -> tuple[list[Part], dict[str, str]]:
    """Return the parts of a suite in the order of its table, and why each set that is missing is left out."""
    if suite.name == SuiteName.corruptions:
        open_data = partial(_open_data, loaded, data)
        pairs = [(each, severity) for each in suite.corruptions for severity in sorted(suite.severities)]
        corrupted = [Part("/".join(map(str, pair)), open_data, corrupted=pair) for pair in pairs]
        return [Part("clean", open_data), *corrupted], {}
    names = _outputs(loaded)
    parts, skipped = _validation(suite, loaded, data, names)
    for name, folder in suite.folders().items():
        if folder is None:
            skipped[name] = f"{NOT_GIVEN}: suite.{name}=FOLDER"
        elif name != "c":
            parts.append(Part(name, partial(_open_set, f"suite.{name}", folder, names, data)))
        else:
            try:
                found = find_corrupted(folder)
            except DataError as error:
                skipped[name] = str(error)
                continue
            for corruption, severities in found.items():
                for severity, place in severities.items():
                    opener = partial(_open_set, "suite.c", str(place), names, data)
                    parts.append(Part(f"c/{corruption}/{severity}", opener, whole=True))
    return parts, skipped


def _outputs(loaded: LoadedModel) -> list[str]:
    """Return the classes of a model's outputs, as WordNet ids. Raises ConfigError if they are others."""
    known, every = loaded.description.classes, imagenet_classes()
    if known is None and loaded.model.num_classes == len(every):
        return every
    if known is None or not set(known) <= set(every):
        raise ConfigError(
            f"suite=imagenet: the classes of {loaded.found.file} are not ImageNet's WordNet ids; "
            "nearest: suite=corruptions"
        )
    return known


def _validation(
    suite: SuiteConfig, loaded: LoadedModel, data: DataConfig, names: list[str]
) -> tuple[list[Part], dict[str, str]]:
    """Return the parts of the validation images, by their own labels and by ReaL's."""
    if suite.val is not None:
        opener = partial(_open_set, "suite.val", suite.val, names, data)
    elif data.name is not None:
        opener = partial(_open_data, loaded, data)
    else:
        return [], dict.fromkeys(("val", "real"), f"{NOT_GIVEN}: suite.val=FOLDER")
    parts, skipped = [Part("val", opener)], {}
    if set(names) == set(imagenet_classes()):
        parts.append(Part("real", opener, by_real=True))
    else:
        skipped["real"] = "needs a model of all 1,000 classes, because its labels are"
    return parts, skipped


def _open_data(loaded: LoadedModel, data: DataConfig) -> tuple[ImageIndex, Labels]:
    """List the set that data says."""
    return loaded.labelled(open_split(data, data.evaluated), data)


def _open_set(key: str, folder: str, names: list[str], data: DataConfig) -> tuple[ImageIndex, Labels]:
    """List the images of a folder whose classes the model knows. The other outputs are left out."""
    index = known_part(open_folder(key, folder, data.follow_links), names)
    own = replace(data, root=str(Path(folder).parent), allow_subset=True, class_map=None)
    return labelled(index, names, own)
