"""Find the shipped YAML files, and the names that they offer."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from deepvit_train.error import ConfigError

# The file with every key of a group, from which presets start. Nobody can choose it.
BASE = "base"
# libyaml reads ten times as fast, and every start reads the presets. A build of PyYAML may lack it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
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


def read_yaml(name: str) -> dict[str, Any]:
    """Return the content of a file of configs/. Raises ConfigError that names the file and the line."""
    file = config_dir() / f"{name}.yaml"
    try:
        content = yaml.load(file.read_text(), _LOADER)
    except yaml.YAMLError as error:
        raise not_yaml(error, file) from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: must hold KEY: VALUE, a line each")
    return content


def not_yaml(error: yaml.YAMLError, file: Path | None = None) -> ConfigError:
    """What is said of a file that is no YAML: the file, the line and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    where = file or getattr(mark, "name", "YAML")
    line = "" if mark is None else f", line {mark.line + 1}"
    return ConfigError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or error})")
