"""Offer what several tests of the data pipeline need."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.photographs import write_photographs


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEG files of 200 real photographs, mostly 500 x 375."""
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, 200)
    return sorted(root.rglob("*.jpg"))
