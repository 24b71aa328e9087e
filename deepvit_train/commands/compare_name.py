"""Call compared runs so that a reader can tell them apart: in tables, in sentences, and as a folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import takewhile

HEAD = 60  # bytes of a folder's name that a person can read


def folder_name(labels: Sequence[str], paths: Sequence[str]) -> str:
    """Return the name of a comparison's folder: what can be read of it, and a digest of all that it is of.

    Args:
        labels: of the models that the first is compared with.
        paths: of all evaluations that are compared, in their order.
    """
    words = re.sub(r"[^\w.+]+", "-", "+".join(labels)).encode(errors="replace")
    # A letter whose bytes are cut in two is left out whole.
    head = words[:HEAD].decode(errors="ignore").strip("-.+")
    digest = hashlib.sha256("\0".join(paths).encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{head}-{digest}" if head else digest


def short_names(labels: Sequence[str]) -> dict[str, str]:
    """Return for each label its number and the part in which it differs from the others: '2 self-d6-s1'."""
    head = len(_common_words(labels))
    return {label: f"{number} {label[head:]}" for number, label in enumerate(labels, start=1)}


def listed(labels: Sequence[str]) -> str:
    """Return labels in a row, with their common beginning once: 'digits-self-s0, -s1'."""
    # The mark before the part that differs stays with it.
    head = max(0, len(_common_words(labels)) - 1)
    return ", ".join([labels[0], *(label[head:] for label in labels[1:])])


def _common_words(labels: Sequence[str]) -> str:
    """Return the whole words that all labels begin with, and the mark after them; '' for one label."""
    if len(labels) < 2:
        return ""
    words = [re.findall(r"[^-_/.+]*[-_/.+]", label) for label in labels]
    same = takewhile(lambda each: len(set(each)) == 1, zip(*words, strict=False))
    head = "".join(each[0] for each in same)
    return head if all(len(label) > len(head) for label in labels) else ""
