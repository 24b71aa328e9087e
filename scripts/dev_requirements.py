"""Print the development requirements of pyproject.toml, one a line, for pip versions that can't read groups."""

import re
from pathlib import Path


def dev_requirements(pyproject: str) -> list[str]:
    """The entries of [dependency-groups] dev. Python 3.10 has no TOML reader, so the one list is found by hand."""
    group = re.search(r"^dev = \[(.*?)^\]", pyproject, flags=re.MULTILINE | re.DOTALL)
    if group is None:
        raise SystemExit("pyproject.toml: no [dependency-groups] dev")
    return re.findall(r'"([^"]+)"', group[1])


if __name__ == "__main__":
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    print("\n".join(dev_requirements(text)))
