"""Find the commands that documents print: in indented or `sh` blocks, and in the heads of YAML files."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# In the order in which a newcomer reads them.
FIRST = ["README.md", "docs/tutorial.md", "docs/data.md", "docs/predict.md", "docs/export.md"]
PAGES = [ROOT / page for page in FIRST]
PAGES += [page for page in sorted(ROOT.glob("docs/**/*.md")) if page not in PAGES]
PAGES += [ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("configs/*/*.yaml"))]

PROGRAMS = ("deepvit-", "python ", "torchrun ", "tensorboard ", "make ", "pip ", "source ", "sbatch ")


@dataclass(frozen=True)
class Documented:
    """A command as a document prints it.

    Args:
        page: the document, relative to the repository.
        text: the command in one line, without its comment.
    """

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words after the program: ['train', 'model.depth=4']; of another program, all words."""
        program, *rest = shlex.split(self.text)
        if program.startswith("deepvit-"):
            return [program.removeprefix("deepvit-"), *rest]
        if "deepvit_train.cli" in rest:
            return rest[rest.index("deepvit_train.cli") + 1 :]
        return [program, *rest]

    @property
    def is_ours(self) -> bool:
        """Whether one process of this project's commands is started, without another program around it."""
        return self.text.startswith(("deepvit-", "python -m deepvit_train.cli "))


def commands_of(page: Path) -> list[Documented]:
    """Return the commands of a page, in order. A prompt and a comment are no part of them."""
    text = page.read_text()
    lines = re.sub(r"\\\n#?\s*", "", text).splitlines()
    found, in_shell = [], False
    for line in lines:
        if line.startswith("```"):
            in_shell = line == "```sh"
            continue
        indent = "#     " if page.suffix == ".yaml" else "" if in_shell else "    "
        command = line.removeprefix(indent).removeprefix("$ ")
        if line.startswith(indent) and command.startswith(PROGRAMS):
            for part in re.split(r" && ", re.sub(r"\s+# .*$", "", command)):
                found.append(Documented(str(page.relative_to(ROOT)), part.strip()))
    return found


def all_commands() -> list[Documented]:
    """Return the commands of all documents, in the order in which a newcomer reads them."""
    return [command for page in PAGES for command in commands_of(page)]
