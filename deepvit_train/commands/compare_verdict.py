"""Say which of several models is better, how sure that is, and what it is worth beside other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from deepvit_train.commands.compare_subject import Subject
from deepvit_train.console import amount
from deepvit_train.evaluation.interval import Estimate, Shift, mcnemar, paired_difference, seeds_difference

CLEAR = 0.05  # a p-value below it is not taken for noise


@dataclass(frozen=True)
class Pair:
    """A model beside the first one, on the same images.

    Args:
        first, second: their labels.
        both_right, both_wrong, gained, lost: numbers of images; gained ones only the second tells right.
        difference: of the accuracies, second minus first.
        p: of McNemar's exact test.
        seeds_alone: whether the configurations are equal but for the seed.
    """

    first: str
    second: str
    both_right: int
    both_wrong: int
    gained: int
    lost: int
    difference: Estimate
    p: float
    seeds_alone: bool

    @property
    def is_clear(self) -> bool:
        """Whether the difference is more than noise of images: a low p-value, and an interval without 0."""
        return self.p < CLEAR and _without_zero(self.difference)

    @property
    def verdict(self) -> str:
        """'better', 'worse' or 'within noise', of the second."""
        if not self.is_clear or self.seeds_alone:
            return "within noise"
        return "better" if self.difference.value > 0 else "worse"

    def sentence(self) -> str:
        """Say it in a sentence or two."""
        figures = f"{_points(self.difference)}, McNemar's p = {self.p:.2g}"
        if self.verdict != "within noise":
            return (
                f"{self.second} is {self.verdict} than {self.first}: {figures}. "
                f"{amount(self.lost, 'image')} became wrong and {self.gained} right."
            )
        text = f"The difference between {self.second} and {self.first} is within noise: {figures}."
        if self.is_clear:
            text += (
                " The two checkpoints differ, but their configurations are equal but for the seed: this is "
                "what seeds do."
            )
        return text

    def plain(self) -> dict[str, Any]:
        """Return the pair as plain data, for JSON."""
        return {
            **asdict(self),
            "difference": self.difference.plain(),
            "verdict": self.verdict,
            "sentence": self.sentence(),
        }


@dataclass(frozen=True)
class Group:
    """Runs whose configurations are equal but for the seed.

    Args:
        label: of its first run, and how many there are.
        runs: their labels.
        accuracies: theirs.
        shift: mean accuracy minus that of the first group; None for the first, or without several seeds.
    """

    label: str
    runs: list[str]
    accuracies: list[float]
    shift: Shift | None

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the accuracy over seeds; None for one run."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def verdict(self) -> str | None:
        """'better', 'worse' or 'within noise' beside the first group; None where nothing can be said."""
        if self.shift is None or self.shift.p is None:
            return None
        if self.shift.p >= CLEAR:
            return "within noise"
        return "better" if self.shift.estimate.value > 0 else "worse"

    def plain(self) -> dict[str, Any]:
        """Return the group as plain data, for JSON."""
        shift = self.shift and {"difference": self.shift.estimate.plain(), "p": self.shift.p}
        own = {"label": self.label, "runs": self.runs, "accuracies": self.accuracies, "mean": self.mean}
        return own | {"deviation": self.deviation, "beside_first": shift, "verdict": self.verdict}


def pair_of(first: Subject, second: Subject) -> Pair:
    """Compare two models on their images, which must be the same."""
    sides = [(row.right, second.rows[path].right) for path, row in first.rows.items()]
    gained, lost = sides.count((False, True)), sides.count((True, False))
    return Pair(
        first=first.label,
        second=second.label,
        both_right=sides.count((True, True)),
        both_wrong=sides.count((False, False)),
        gained=gained,
        lost=lost,
        difference=paired_difference(gained, lost, len(sides)),
        p=mcnemar(gained, lost),
        seeds_alone=first.group is not None and first.group == second.group,
    )


def groups_of(subjects: Sequence[Subject]) -> list[Group]:
    """Return the models by configuration, in the order in which each group begins."""
    members: dict[str, list[Subject]] = {}
    for subject in subjects:
        members.setdefault(subject.group or f"alone: {subject.folder}", []).append(subject)
    found: list[Group] = []
    for each in members.values():
        accuracies = [subject.accuracy for subject in each]
        runs = [subject.label for subject in each]
        label = runs[0] if len(runs) == 1 else f"{runs[0]} and {len(runs) - 1} more"
        shift = seeds_difference(found[0].accuracies, accuracies) if found else None
        found.append(Group(label, runs, accuracies, shift))
    return found


def conclude(pairs: Sequence[Pair], groups: Sequence[Group]) -> list[str]:
    """Say in sentences what was found: of groups of seeds, of each pair, and what that leaves open."""
    lines = [_of_group(groups[0], group) for group in groups[1:] if group.verdict is not None]
    lines += [pair.sentence() for pair in pairs]
    spread = [group for group in groups if group.deviation is not None]
    if len(spread) < len(groups) and len(groups) > 1:
        known = "".join(
            f" The {len(group.runs)} seeds of {group.label} have a standard deviation of "
            f"{100 * (group.deviation or 0.0):.2f} points."
            for group in spread
        )
        lines.append(
            "Where a configuration was trained once, this is about one checkpoint and not about the "
            f"configuration: another seed would give another accuracy.{known}"
        )
    if len(pairs) > 1:
        lines.append(f"There are {len(pairs)} comparisons: by chance alone one in twenty would seem clear.")
    return lines


def _of_group(first: Group, group: Group) -> str:
    shift = group.shift
    assert shift is not None
    figures = f"{_points(shift.estimate)}, Welch's p = {shift.p:.2g}"
    seeds = f"{len(group.runs)} and {len(first.runs)} seeds"
    if group.verdict == "within noise":
        who = f"{group.label} to {first.label}"
        return f"Over seeds the difference of {who} is within noise: {figures} ({seeds})."
    return f"Over seeds {group.label} is {group.verdict} than {first.label}: {figures} ({seeds})."


def _points(estimate: Estimate) -> str:
    """Say a difference of accuracies in points, with its interval."""
    low, high = (100 * (end or 0.0) for end in (estimate.low, estimate.high))
    return f"{100 * estimate.value:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def _without_zero(estimate: Estimate) -> bool:
    low, high = estimate.low, estimate.high
    return low is not None and high is not None and not low <= 0 <= high
