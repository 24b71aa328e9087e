"""Write and check requirements.lock: each package that pyproject.toml leads to, with its version and SHA-256.

    make lock                         # after a change of dependencies; versions that still fit stay
    make lock LOCK_OPTIONS=--upgrade  # the newest versions that pyproject.toml allows
    make lock-check                   # fail where it was written for other dependencies; needs no network
    python -m scripts.lock oldest     # print the oldest versions that pyproject.toml allows, for pip

Writing needs uv, which reads versions and digests from the index and downloads hardly a package. One file
serves every Python and system that pyproject.toml allows. Its first line holds a digest of the dependencies
in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = "requirements.lock"
COMPILE = ["uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal", "--generate-hashes"]
COMPILE += ["--no-header", "--no-emit-index-url", "--no-emit-find-links", "--quiet", "--output-file", LOCK]


def first_line(project: Path) -> str:
    """Return the line that a lock file of this pyproject.toml begins with."""
    tables = tomllib.loads(project.read_text())["project"]
    asked = [tables[key] for key in ("requires-python", "dependencies", "optional-dependencies")]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return f"# Written by `make lock` for the dependencies in pyproject.toml with SHA-256 {digest}\n"


def is_current(root: Path) -> bool:
    """Return whether root/requirements.lock was written for the dependencies in root/pyproject.toml."""
    lock = root / LOCK
    return lock.exists() and lock.read_text().startswith(first_line(root / "pyproject.toml"))


def write(root: Path, options: list[str]) -> None:
    """Write root/requirements.lock. Raises CalledProcessError where no set of versions fits."""
    subprocess.run([sys.executable, "-m", *COMPILE, *options], cwd=root, check=True)
    lock = root / LOCK
    lock.write_text(first_line(root / "pyproject.toml") + lock.read_text())


def oldest(project: Path) -> list[str]:
    """Return each dependency of this pyproject.toml at the lower bound of its versions: name==version."""
    dependencies = tomllib.loads(project.read_text())["project"]["dependencies"]
    return [re.sub(r">=([^,]+).*", r"==\1", dependency) for dependency in dependencies]


def main(arguments: list[str]) -> int:
    """Run `write OPTIONS`, `check` or `oldest`, and return the exit code."""
    if arguments == ["oldest"]:
        print(*oldest(ROOT / "pyproject.toml"), sep="\n")
        return 0
    if arguments[:1] == ["write"]:
        write(ROOT, arguments[1:])
    elif arguments != ["check"]:
        print("error: give write, check or oldest", file=sys.stderr)
        return 2
    if is_current(ROOT):
        return 0
    print(f"error: {LOCK} does not belong to pyproject.toml; run `make lock`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
