"""What compared runs are called: short where a table has little room, and never one folder for two sets."""

from __future__ import annotations

import pytest

from deepvit_train.commands.compare_name import folder_name, listed, short_names
from deepvit_train.commands.evaluate_result import slug

ARMS = [f"digits-{arm}-d6-s{seed}" for arm in ("self", "reattention", "gated_reattention") for seed in (0, 1)]


def named(labels: list[str]) -> str:
    return folder_name(labels[1:], labels)


def test_no_two_comparisons_share_a_folder() -> None:
    sets = [
        ARMS,
        ARMS[:5],  # its name differs only where a long name would be cut
        [*ARMS[:4], ARMS[5], ARMS[4]],
        [*ARMS[:5], "digits-gated_reattention-d6-s2"],
        ["a", "b"],
        ["a", "b "],
        ["c", "b"],
        ["a", "größe"],
        ["a", "größen" * 20],
        ["a", "..."],
        ["a", "\udcff"],
    ]
    names = [named(labels) for labels in sets]
    assert len(set(names)) == len(sets)
    assert names == [named(labels) for labels in sets]
    assert all(len(name.encode()) < 80 and name.strip("-. ") == name and "/" not in name for name in names)
    assert named(["a", "b", "c"]).startswith("b+c-")


@pytest.mark.parametrize(
    ("labels", "short", "row"),
    [
        (ARMS[:2], ["1 s0", "2 s1"], "digits-self-d6-s0, -s1"),
        (
            [ARMS[0], ARMS[2]],
            ["1 self-d6-s0", "2 reattention-d6-s0"],
            "digits-self-d6-s0, -reattention-d6-s0",
        ),
        (["long0", "long1"], ["1 long0", "2 long1"], "long0, long1"),
        (["a", "a-b"], ["1 a", "2 a-b"], "a, a-b"),
        (["x-", "x-b"], ["1 x-", "2 x-b"], "x-, x-b"),
        (["alone-s0"], ["1 alone-s0"], "alone-s0"),
    ],
)
def test_names_lose_what_they_have_in_common(labels: list[str], short: list[str], row: str) -> None:
    assert list(short_names(labels).values()) == short
    assert listed(labels) == row


def test_no_two_values_get_one_part_of_a_files_name() -> None:
    values = ["val", "a b", "a-b", "a/b", "x" * 40, "x" * 41, "[0.5, 0.5]", "[-0.5, 0.5]", "[a, b]", "0.25"]
    parts = [slug(value) for value in values]
    assert len(set(parts)) == len(values)
    assert (parts[0], parts[2], parts[6], parts[9]) == ("val", "a-b", "0.5-0.5", "0.25")
