"""Find the shipped YAML files, and the names that they offer."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from deepvit_train.error import ConfigError

# The file with every key of a group, from which presets start. Nobody can choose it.
BASE = "base"


def config_dir() -> Path:
    """Return the folder of YAML files: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"configs/ is neither inside nor beside {package}: reinstall deepvit-train")


def choices(group: str) -> list[str]:
    """Return the choices of a configuration group, sorted: choices('attn'). `base` is none of them."""
    return sorted(file.stem for file in (config_dir() / group).glob("*.yaml") if file.stem != BASE)


@cache
def attention_kinds() -> list[str]:
    """Return the forms of attention that the files of configs/attn/ name, sorted."""
    texts = (file.read_text() for file in (config_dir() / "attn").glob("*.yaml"))
    return sorted({found[1] for text in texts if (found := re.search(r"^kind: (\w+)", text, re.MULTILINE))})
