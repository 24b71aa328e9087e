"""Show that each record of a measurement says what was run, where, with which versions and how often."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs" / "records"
RECORDS = sorted(path for path in FOLDER.iterdir() if path.name != "README.md")


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
def test_a_record_has_its_name_and_first_lines(record: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.(md|json)", record.name)
    text = record.with_suffix(".md").read_text()
    names = ("Command", "Machine", "Versions", "n", "Also running")
    first = ["# .+", "", *(rf"- {name}: .+" for name in names)]
    lines = [line for line in text.splitlines() if not line.startswith("  ")]
    for line, pattern in zip(lines[: len(first)], first, strict=True):
        assert re.fullmatch(pattern, line), line
