"""Say which of several models is better, how sure that is, and what it is worth beside other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deepvit_train.commands.compare_group import CLEAR, Contest, Group, points
from deepvit_train.commands.compare_subject import Subject
from deepvit_train.console import amount
from deepvit_train.evaluation.interval import Estimate, mcnemar, paired_difference


@dataclass(frozen=True)
class Pair:
    """A model beside another one, on the same images.

    Args:
        first, second: their labels.
        both_right, both_wrong, gained, lost: numbers of images; gained ones only the second tells right.
        difference: of the accuracies, second minus first.
        p: of McNemar's exact test.
        seeds_alone: whether the configurations are equal but for the seed.
        over_seeds: whether their configurations are compared over seeds. Then this pair decides nothing.
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
    over_seeds: bool = False

    @property
    def is_clear(self) -> bool:
        """Whether the difference is more than noise of images: a low p-value, and an interval without 0."""
        return self.p < CLEAR and _without_zero(self.difference)

    @property
    def verdict(self) -> str | None:
        """'better', 'worse' or 'within noise', of the second; None where seeds decide."""
        if self.over_seeds:
            return None
        if not self.is_clear or self.seeds_alone:
            return "within noise"
        return "better" if self.difference.value > 0 else "worse"

    def sentence(self) -> str:
        """Say it in a sentence or two."""
        figures = f"{points(self.difference)}, McNemar's p = {self.p:.2g}"
        if self.verdict is None:
            return f"{self.second} beside {self.first}, one seed: {figures}."
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


def pair_of(first: Subject, second: Subject, over_seeds: bool = False) -> Pair:
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
        over_seeds=over_seeds,
    )


def pairs_of(groups: Sequence[Group], contests: Sequence[Contest]) -> list[Pair]:
    """Compare the models with the first one; where groups are compared over seeds, seed by seed.

    A run has no like seed in the first group if its seed was not trained there. It is compared with the
    first run.
    """
    first, every = groups[0], [subject for group in groups for subject in group.subjects]
    if not contests:
        return [pair_of(every[0], other) for other in every[1:]]
    decided = [contest.second for contest in contests if contest.first is first]
    like = {subject.seed: subject for subject in reversed(first.subjects)}
    return [
        pair_of(like.get(subject.seed, every[0]), subject, over_seeds=group in decided)
        for group in groups[1:]
        for subject in group.subjects
    ]


def conclude(pairs: Sequence[Pair], groups: Sequence[Group], contests: Sequence[Contest]) -> list[str]:
    """Say in sentences what was found: of groups of seeds, of each pair, and what that leaves open."""
    lines = [contest.sentence() for contest in contests]
    if len(contests) > 1:
        lines.append(
            f"There are {len(contests)} comparisons over seeds: their p-values are corrected by Holm's "
            "method, their intervals are not."
        )
    judged = [pair for pair in pairs if pair.verdict is not None]
    lines += [pair.sentence() for pair in judged]
    spread = [group for group in groups if group.deviation is not None]
    if len(spread) < len(groups) and len(groups) > 1:
        known = "".join(
            f" The {len(group.runs)} seeds of {group.name} have a standard deviation of "
            f"{100 * (group.deviation or 0.0):.2f} points."
            for group in spread
        )
        lines.append(
            "Where a configuration was trained once, this is about one checkpoint and not about the "
            f"configuration: another seed would give another accuracy.{known}"
        )
    if len(judged) > 1:
        lines.append(
            f"There are {len(judged)} comparisons of checkpoints: by chance alone one in twenty would seem "
            "clear."
        )
    return lines


def _without_zero(estimate: Estimate) -> bool:
    low, high = estimate.low, estimate.high
    return low is not None and high is not None and not low <= 0 <= high
