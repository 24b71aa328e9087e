"""Show that what the documents promise exists: links and paths lead somewhere, commands and keys are real."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from deepvit_train.commands import train_timm
from deepvit_train.config.command import COMMANDS
from deepvit_train.config.compose import compose_tree
from deepvit_train.config.from_timm import from_timm

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob(".github/**/*.md"), *ROOT.glob("docs/**/*.md")])
PAGES += sorted(ROOT.glob("tests/**/*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = {name.removeprefix("deepvit-") for name in PROJECT["scripts"]}
LONG = 100  # lines; a page with more begins with a table of contents

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get: 'Where is X?' is where-is-x."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        there = page.parent / file if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


@every_page
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"(?<![\w./-])((?:deepvit_train|tests|configs|scripts|docs)/[\w./*-]*)", text):
        path = path.rstrip(".")
        assert list(ROOT.glob(path.rstrip("/"))), path
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)", text):
        assert re.search(rf"^def {test}", (ROOT / file).read_text(), flags=re.MULTILINE), f"{file}::{test}"


def commands_in(page: Path) -> list[list[str]]:
    """The commands of this project in a page's indented blocks, as words: ['train', 'model.depth=4']."""
    found = []
    # The attention that a page adds is not shipped: tests/models/test_new_attention.py runs it.
    text = page.read_text().replace("gated_reattention", "reattention")
    for line in text.replace("\\\n", " ").splitlines():
        line = line.removeprefix("    $ ") if line.startswith("    $ ") else line
        called = re.search(r"^(?: {4})?(?:deepvit-(\w+)|.*-m deepvit_train\.cli (\w+))(?: |$)(.*)", line)
        if called and line.startswith(("    ", "deepvit-")):
            found.append([called[1] or called[2], *shlex.split(called[3], comments=True)])
    return found


@every_page
def test_commands_and_keys_are_real(page: Path) -> None:
    for words in commands_in(page):
        command, *rest = words
        assert command in SCRIPTS, command
        if "--from-timm" in rest:
            from_timm(rest[rest.index("--from-timm") + 1 :], lambda: train_timm)
            continue
        if command == "data":
            command, rest = f"data-{rest[0]}", rest[1:]
        if "&&" in rest:
            rest = rest[: rest.index("&&")]
        assert command in COMMANDS, command
        # A sweep is composed once, with the first of each list of values.
        sweep = "-m" in rest
        overrides = [word.partition(",")[0] if sweep else word for word in rest if "=" in word]
        compose_tree(command, overrides)


def test_every_command_is_in_the_readme() -> None:
    assert {command for command, *_ in commands_in(ROOT / "README.md")} == SCRIPTS


def test_the_readme_reaches_a_command_within_a_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(number for number, line in enumerate(lines) if line.startswith("    make ")) <= 27


def test_every_dependency_is_explained() -> None:
    page = (ROOT / "docs/decisions/0002-dependencies.md").read_text()
    for requirement in PROJECT["dependencies"]:
        name = re.split(r"[^\w-]", requirement)[0]
        assert re.search(rf"^\|[^|]*\b{name}\b", page, flags=re.MULTILINE), name


@every_page
def test_long_pages_begin_with_a_table_of_contents(page: Path) -> None:
    text = page.read_text()
    if len(text.splitlines()) > LONG and page.parent != ROOT:
        top = text.partition("\n## ")[0]
        assert re.search(r"\]\(#", top), "no table of contents"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        here = page.relative_to(ROOT / "docs")
        # Decisions, records and the study's table are reached through their folders' own lists.
        if here != Path("README.md") and here.parts[0] not in ("decisions", "records"):
            assert str(here) in index or here.parts[0] == "study", str(here)
