"""Change the files of a run as an adversary would: values, text, and what lies where a file belongs."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepvit_train.run.checkpoint import as_json

DEEP: Any = 0
for _ in range(60):
    DEEP = [DEEP]
ODD: list[Any] = [
    None, True, False, -1, 0, 0.5, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**53 + 1, 2**64, 10**30,
    10**400, "", "x", "x" * 5000, "../../../outside/file", "/dev/zero", "\0", "\ud800", "\udcff", "\x1b[31m",
    "a\nb", "nan", "1", [], {}, [[]], {"": None}, [None] * 1000, {"step": {}}, DEEP, ["a", 1, None],
    "e\u0301",
]  # fmt: skip
TEXTS: list[Callable[[bytes, random.Random], bytes]] = [
    lambda text, rng: text[: rng.randrange(len(text) + 1)],
    lambda text, rng: b"",
    lambda text, rng: b"[" * 100_000,
    lambda text, rng: b'{"a":' * 100_000,
    lambda text, rng: b"1" * 5000,
    lambda text, rng: b"\xff\xfe" + text,
    lambda text, rng: text.decode(errors="replace").encode("utf-16"),
    lambda text, rng: text + text,
    lambda text, rng: b"\0" * 4096,
    lambda text, rng: b"null",
    lambda text, rng: b"[]",
    lambda text, rng: b"{}",
    lambda text, rng: text.replace(b'"step"', b'"step": 1, "step"', 1),
    lambda text, rng: _flipped(text, rng),
    lambda text, rng: _flipped(text, rng),
]


def _doubling(first: bytes, line: bytes) -> bytes:
    """Return YAML of sixteen names, each of which stands for nine of the one before."""
    lines = [line % (name, name, b", ".join([b"*%c" % (name - 1)] * 9)) for name in range(98, 114)]
    return first + b"".join(lines)


YAML_TEXTS = [
    _doubling(b"a: &a [1, 1]\n", b"%c: &%c [%s]\n"),
    _doubling(b"a: &a {x: 1}\n", b"%c: &%c {<<: [%s]}\n"),
    b"a: &a [*a]\n",
    b"a: !!python/object/apply:os.system [id]\n",
    b"a: 2001-99-99\n",
    b"a: !!int x\n",
    b"? [a]\n: 1\n",
    b"a: 1\na: 2\n",
    b"- 1\n",
    b"a: !!binary x\n",
    b"1: 2\n",
    b"a: 0x" + b"f" * 9000,
    b"\t- a",
    b"a: {b: {c: {d: 2001-01-01}}}\n",
]


def _flipped(text: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(text))
    return text[:place] + bytes([text[place] ^ 1 << rng.randrange(8)]) + text[place + 1 :]


def mutated(content: Any, rng: random.Random) -> Any:
    """Return plain data with one value or key of it changed, removed or added."""
    places = list(_places(content))
    holder, key = rng.choice(places) if places else (None, None)
    if holder is None:
        return rng.choice(ODD)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "\x1b[2J", "step", "../x", "k" * 3000])] = rng.choice(ODD)
    elif kind == 2:
        other, its = rng.choice(places)
        holder[key] = copy.deepcopy(other[its])
    elif kind == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = rng.choice(
            [-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key]), holder[key] / 3]
        )
    else:
        holder[key] = rng.choice(ODD)
    return content


def _places(content: Any) -> Any:
    if isinstance(content, (dict, list)):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


def resign(checkpoint: Path) -> None:
    """Write a manifest that fits the files of a checkpoint as they are."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    names = [name for name in manifest["sha256"] if (checkpoint / name).is_file()]
    manifest["sha256"] = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names
    }
    (checkpoint / "manifest.json").write_text(as_json(manifest))


def change_description(file: Path, change: Callable[[Any], Any], raw: bool = False) -> None:
    """Change what a weights file says of its model; with `raw` as text, else as plain data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    text = header["__metadata__"]["deepvit_train"]
    header["__metadata__"]["deepvit_train"] = change(text) if raw else json.dumps(change(json.loads(text)))
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    file.write_bytes(len(written).to_bytes(8, "little") + written + content[8 + length :])


def put_instead(path: Path, what: str, outside: Path) -> None:
    """Put something else where a file or a folder lies: a link to the outside, a pipe, a socket, a folder."""
    if path.is_dir() and not path.is_symlink():
        path.rename(outside / f"moved-{path.name}")
    else:
        path.unlink(missing_ok=True)
    if what == "link":
        target = outside / (f"moved-{path.name}" if (outside / f"moved-{path.name}").exists() else "file")
        path.symlink_to(target)
    elif what == "dangling":
        path.symlink_to(outside / "absent")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path has a hundred letters at most
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)
    elif what == "folder":
        path.mkdir()


def snapshot(folder: Path) -> dict[str, Any]:
    """Return all that lies in a folder: kinds, modes, times of change, contents, and where links lead."""
    found: dict[str, Any] = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        content: Any = str(path.readlink()) if path.is_symlink() else None
        if content is None and path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, status.st_nlink, content)
    return found
