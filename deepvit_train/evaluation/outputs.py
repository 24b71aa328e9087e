"""What is known of a model's outputs, and which of them each class of a data set is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from timm.data import ImageNetInfo

from deepvit_train.classes import ORDERS, ordered, shortened
from deepvit_train.config.data import DataConfig
from deepvit_train.console import amount
from deepvit_train.data.index import ImageIndex
from deepvit_train.data.label import Labels, labelled
from deepvit_train.error import DataError

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model.

    Args:
        names: of the classes, by output; None: its file does not say.
        order: of the program that wrote the file, in which names are taken that it does not say.
        file: of the weights, for messages.
        key: that names the classes, for messages.
    """

    count: int
    names: list[str] | None
    order: str
    file: str
    key: str = "classes"

    def labelled(self, index: ImageIndex, data: DataConfig) -> tuple[ImageIndex, Labels]:
        """Return a split with the model's numbers for its classes, and how they were matched.

        They are matched by name. Where the model's names are not known, they are taken to be the data set's,
        in the order of the program that wrote the file; a note says so where the usual orders differ.

        Raises DataError if they can't be matched.
        """
        if self.names is not None:
            return labelled(index, self.names, data, f"those of {self.file}")
        names, by = ordered(index.classes, self.order), f"{self.order}'s order"
        if (imagenet := _imagenet_names(self.count, names)) is not None:
            names, by = imagenet, "ImageNet-1k's order"
        elif len(names) != self.count:
            raise DataError(
                f"{index.folder}: {amount(len(names), 'class', 'classes')}, but the model of "
                f"{self.file} has {self.count}, and the file names none"
                f"\n{self.key}=FILE names them"
            )
        index, labels = labelled(index, names, data)
        (other,) = set(ORDERS) - {self.order}
        otherwise, notes = ordered(names, other), []
        if names is not imagenet and otherwise != names:
            notes = [
                f"warning: {self.file} names no classes, so its outputs are taken in {self.order}'s order "
                f"of the folders ({shortened(names)})\n{self.key}={other} takes {other}'s order "
                f"({shortened(otherwise)}), and {self.key}=FILE names them"
            ]
        return index, replace(labels, by=by, notes=notes)


def _imagenet_names(outputs: int, names: list[str]) -> list[str] | None:
    """Return ImageNet-1k's class names, if a model of 1,000 outputs meets folders that are named so."""
    if outputs != IMAGENET_CLASSES:
        return None
    known = ImageNetInfo("imagenet-1k").label_names()
    return known if set(names) <= set(known) else None
