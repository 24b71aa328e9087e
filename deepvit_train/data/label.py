"""Which output of a model each class of a data set is: matched by name, never by place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deepvit_train.classes import difference, shortened
from deepvit_train.config.data import DataConfig
from deepvit_train.console import amount
from deepvit_train.data.index import ImageIndex
from deepvit_train.error import DataError


@dataclass(frozen=True)
class Labels:
    """How the classes of a data set were matched to a model's outputs.

    Args:
        names: of all outputs, in order.
        absent: the outputs whose classes the data set lacks. An evaluation leaves them out.
        by: what they were matched by: 'name', or an order of names where the model's are not known.
        class_map: the file that said which class a folder is, or None.
        notes: lines that the user must see.
    """

    names: list[str]
    absent: list[int] = field(default_factory=list)
    by: str = "name"
    class_map: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def present(self) -> int:
        """How many outputs are evaluated."""
        return len(self.names) - len(self.absent)

    @property
    def restriction(self) -> str:
        """Say which outputs an evaluation is restricted to; '' if it is not."""
        if not self.absent:
            return ""
        present = self.present
        return (
            f"outputs restricted to the {amount(present, 'class', 'classes')} present, of {len(self.names)}"
        )

    @property
    def lines(self) -> list[str]:
        """What the user must see: the notes, and the restriction if there is one."""
        return [*self.notes, *([self.restriction] if self.absent else [])]

    def summary(self) -> dict[str, Any]:
        """Return the matching as plain data, for JSON."""
        return {
            "matched_by": self.by,
            "outputs": len(self.names),
            "classes": self.present,
            "restricted_to_present": bool(self.absent),
            "class_map": self.class_map,
        }


def labelled(
    index: ImageIndex, names: list[str], data: DataConfig, owner: str = "the model's"
) -> tuple[ImageIndex, Labels]:
    """Return a split with the numbers that a model gives its classes, and how they were matched.

    Args:
        names: of the model's outputs, in order.
        owner: whose classes these are, for a message.

    Raises DataError if the names are others, with what is unknown and what is missing.
    """
    if problem := difference(index.classes, names, data.allow_subset):
        hints = ["data.class_map=FILE says which class a folder is, in lines 'folder: class'"]
        if not set(index.classes) - set(names):
            hints = ["data.allow_subset=true takes a data set that lacks classes"]
        raise DataError(f"{index.title}: other classes than {owner} ({problem})\n{'; '.join(hints)}")
    present = set(index.classes)
    absent = [place for place, name in enumerate(names) if name not in present]
    labels = Labels(names, absent, class_map=data.class_map)
    if index.classes == names:
        return index, labels
    numbers = {name: place for place, name in enumerate(names)}
    if not labels.absent:
        labels.notes.append(
            f"{index.title}: classes are matched by name; the model's order is "
            f"{shortened(names)}, the folder's {shortened(index.classes)}"
        )
    targets = np.array([numbers[name] for name in index.classes], np.int32)[index.targets]
    return replace(index, classes=names, targets=targets), labels
