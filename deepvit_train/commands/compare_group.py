"""Compare configurations over seeds: runs that differ in their seed alone are one group."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from deepvit_train.commands.compare_name import listed
from deepvit_train.commands.compare_subject import Subject
from deepvit_train.console import amount
from deepvit_train.evaluation.interval import Estimate, Shift, holm, seeds_difference

CLEAR = 0.05  # a p-value below it is not taken for noise
CHOICES = ("kind", "name")  # a key of this name says which of several forms a section has
SHOWN_KEYS = 3  # in the name of a configuration


@dataclass(frozen=True)
class Group:
    """Runs whose configurations are equal but for the seed.

    Args:
        name: the keys in which it differs from the other groups, 'attn=self'; or else the first run.
        subjects: its runs.
    """

    name: str
    subjects: list[Subject]

    @property
    def runs(self) -> list[str]:
        """The labels of its runs."""
        return [subject.label for subject in self.subjects]

    @property
    def label(self) -> str:
        """Its name and its runs: 'attn=self (2 seeds: digits-self-s0, -s1)'."""
        if self.name == self.runs[0]:
            return listed(self.runs)
        seeds = "" if len(self.runs) == 1 else f"{amount(len(self.runs), 'seed')}: "
        return f"{self.name} ({seeds}{listed(self.runs)})"

    @property
    def accuracies(self) -> list[float]:
        """The accuracy of each run."""
        return [subject.accuracy for subject in self.subjects]

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the accuracy over seeds; None for one run."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def plain(self) -> dict[str, Any]:
        """Return the group as plain data, for JSON."""
        return {
            "name": self.name,
            "label": self.label,
            "runs": self.runs,
            "accuracies": self.accuracies,
            "mean": self.mean,
            "deviation": self.deviation,
        }


@dataclass(frozen=True)
class Contest:
    """Two groups of several runs each, compared over seeds.

    Args:
        first, second: the groups.
        shift: mean accuracy of the second minus that of the first, and the p-value of this test alone.
        p: the p-value, corrected by Holm's method for the number of contests; None where there is no spread.
    """

    first: Group
    second: Group
    shift: Shift
    p: float | None

    @property
    def verdict(self) -> str:
        """'better', 'worse' or 'within noise', of the second; 'no test' where there is no spread."""
        if self.p is None:
            return "no test"
        if self.p >= CLEAR:
            return "within noise"
        return "better" if self.shift.estimate.value > 0 else "worse"

    def sentence(self) -> str:
        """Say it in a sentence or two."""
        first, second = self.first.label, self.second.label
        difference = points(self.shift.estimate)
        if self.p is None:
            return (
                f"Over seeds {second} and {first} can't be tested: {difference}, and within each of them all "
                "seeds have the same accuracy."
            )
        figures = f"{difference}, p = {self.p:.2g}"
        if self.verdict == "within noise":
            return f"Over seeds the difference of {second} to {first} is within noise: {figures}."
        return f"Over seeds {second} is {self.verdict} than {first}: {figures}."

    def plain(self) -> dict[str, Any]:
        """Return the contest as plain data, for JSON."""
        return {
            "first": self.first.name,
            "second": self.second.name,
            "difference": self.shift.estimate.plain(),
            "p": self.shift.p,
            "p_holm": self.p,
            "verdict": self.verdict,
            "sentence": self.sentence(),
        }


def groups_of(subjects: Sequence[Subject]) -> list[Group]:
    """Return the models by configuration, in the order in which each group begins."""
    members: dict[str, list[Subject]] = {}
    for subject in subjects:
        members.setdefault(subject.group or f"alone: {subject.folder}", []).append(subject)
    groups = list(members.values())
    names = _names([each[0].settings for each in groups])
    if "" in names or len(set(names)) < len(names):  # not all of them are told apart by keys
        names = [each[0].label for each in groups]
    return [Group(name, each) for name, each in zip(names, groups, strict=True)]


def contests_of(groups: Sequence[Group]) -> list[Contest]:
    """Compare every two groups of several runs each."""
    shifts = [
        (first, second, shift)
        for first, second in combinations(groups, 2)
        if (shift := seeds_difference(first.accuracies, second.accuracies)) is not None
    ]
    tested = [shift.p for _, _, shift in shifts if shift.p is not None]
    corrected = iter(holm(tested))
    return [
        Contest(first, second, shift, None if shift.p is None else next(corrected))
        for first, second, shift in shifts
    ]


def points(estimate: Estimate) -> str:
    """Say a difference of accuracies in points, with its interval if it has one."""
    value = f"{100 * estimate.value:+.2f} points"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} (95 % interval {100 * estimate.low:+.2f} to {100 * estimate.high:+.2f})"


def _names(settings: Sequence[dict[str, Any] | None]) -> list[str]:
    """Return for each configuration the keys in which it differs from the others, with its values."""
    known = [each or {} for each in settings]
    keys = [
        key
        for key in sorted(set().union(*known))
        if any(each.get(key) != known[0].get(key) for each in known)
    ]
    chosen = [key for key in keys if not _follows(key, keys, known)]
    more = len(chosen) - SHOWN_KEYS
    ending = f" and {amount(more, 'more key')}" if more > 0 else ""
    return [
        ", ".join(f"{_section(key)}={_told(each.get(key))}" for key in chosen[:SHOWN_KEYS]) + ending
        if each
        else ""
        for each in known
    ]


def _follows(key: str, keys: Sequence[str], known: Sequence[dict[str, Any]]) -> bool:
    """Whether a key says nothing beside the choice of a form: all of attn=self have one value of it."""
    for choice in (f"{key.rpartition('.')[0]}.{name}" for name in CHOICES):
        if choice in keys and choice != key:
            values: dict[str, set[str]] = {}
            for each in known:
                values.setdefault(str(each.get(choice)), set()).add(_told(each.get(key)))
            return len(values) > 1 and all(len(found) == 1 for found in values.values())
    return False


def _section(key: str) -> str:
    """Return a key as it is typed: `attn` for `attn.kind`."""
    section, _, name = key.rpartition(".")
    return section if section and name in CHOICES else key


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
