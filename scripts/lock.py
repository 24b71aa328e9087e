"""requirements.lock: every package that pyproject.toml asks for, directly or not, by version and SHA-256.

    make lock                         # after a change of dependencies; versions that still fit stay
    make lock LOCK_OPTIONS=--upgrade  # the newest versions that pyproject.toml allows
    make lock-check                   # whether the file belongs to today's pyproject.toml; needs no network

Writing needs uv, which reads the versions and digests of packages from the index and downloads none of them. One file
serves every Python and system that pyproject.toml allows. Its first line holds a digest of pyproject.toml's dependencies.
"""

from __future__ import annotations

import hashlib
import json
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


def main(arguments: list[str]) -> int:
    """Run `write OPTIONS` or `check`, and return the exit code."""
    if arguments[:1] == ["write"]:
        write(ROOT, arguments[1:])
    elif arguments != ["check"]:
        print("error: give write or check", file=sys.stderr)
        return 2
    if is_current(ROOT):
        return 0
    print(f"error: {LOCK} does not belong to pyproject.toml; run `make lock`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
