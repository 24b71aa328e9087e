"""Show that the lock file belongs to pyproject.toml, and that checking it needs no network."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from scripts.lock import LOCK, ROOT, is_current, main, oldest

PROJECT = ROOT / "pyproject.toml"


def test_the_lock_file_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert main(["chekc"]) == 2
    assert "give write, check or oldest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "current"),
    [
        ('"einops>=0.8"', '"einops>=0.9"', False),
        ('"hypothesis>=6",', "", False),
        ("dependencies = [", 'dependencies = [\n    "six",', False),
        ('requires-python = ">=3.11"', 'requires-python = ">=3.12"', False),
        ("line-length = 110", "line-length = 100", True),
    ],
)
def test_a_change_of_dependencies_is_seen(tmp_path: Path, before: str, after: str, current: bool) -> None:
    shutil.copy(ROOT / LOCK, tmp_path)
    text = PROJECT.read_text()
    assert before in text
    (tmp_path / "pyproject.toml").write_text(text.replace(before, after))
    assert is_current(tmp_path) == current


def test_every_dependency_is_locked_within_its_bounds_and_by_digests() -> None:
    text = (ROOT / LOCK).read_text()
    locked = dict(re.findall(r"^([\w.-]+)==([^ ]+)", text, flags=re.MULTILINE))
    tables = tomllib.loads(PROJECT.read_text())["project"]
    # Development takes in all extras but these two (docs/decisions/0002-dependencies.md).
    extras = [
        line
        for name, extra in tables["optional-dependencies"].items()
        if name not in ("wandb", "trackio")
        for line in extra
    ]
    for line in [*tables["dependencies"], *extras]:
        if line.startswith(f"{tables['name']}["):
            continue  # one extra takes in another
        asked = Requirement(line)
        assert asked.specifier.contains(locked[asked.name]), line
    blocks = re.split(r"\n(?=[\w.-]+==)", text)[1:]
    assert len(blocks) >= len(locked) > 50
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text  # no address of an index, and no path of a machine
    assert " @ " not in text


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    for line, asked in zip(
        oldest(PROJECT), tomllib.loads(PROJECT.read_text())["project"]["dependencies"], strict=True
    ):
        name, _, version = line.partition("==")
        bounds = Requirement(asked).specifier
        assert Requirement(asked).name == name
        assert bounds.contains(version)
        assert Version(version) == min(Version(bound.version) for bound in bounds)
