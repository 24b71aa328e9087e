"""What the documents promise exists: links lead somewhere, commands and keys are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepvit_train.config.command import COMMANDS, groups_of, keys_of

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SCRIPTS = re.findall(r"^deepvit-(\w+) = ", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_keys_are_real(page: Path) -> None:
    for command, rest in re.findall(
        r"^ {4}deepvit-(\w+)((?: +[^ #\n]+)*)", page.read_text(), flags=re.MULTILINE
    ):
        assert command in SCRIPTS, command
        if command not in COMMANDS:
            continue
        known = {key.name for key in keys_of(COMMANDS[command])} | set(groups_of(command))
        for name in re.findall(r"(?:^| )\+?([a-z_.]+)=", rest):
            assert name in known, f"deepvit-{command} {name}="


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in SCRIPTS:
        assert f"deepvit-{command}" in readme
