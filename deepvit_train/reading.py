"""Files of a run are read here: regular files of a bounded size, whose content is checked before it is used.

They may come from a stranger. So no link is followed, a pipe is refused instead of waited for, and what JSON
and YAML can hold is bounded: size, depth, number of values, and no key twice.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from deepvit_train.error import CheckpointError

LARGEST = 32 << 20  # bytes of a JSON file
LARGEST_YAML = 1 << 18  # bytes; YAML takes a second a megabyte
LARGEST_LINE = 1 << 20  # bytes of a line of metrics.jsonl
LARGEST_NUMBER = 2**64
DEEPEST = 16  # containers in each other
MOST_VALUES = 1_000_000  # of a file, with each alias counted as what it stands for
KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
# NUL, and half characters of UTF-16. The range left out stands for the raw bytes of a file's name.
NO_LETTER = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


class ContentError(ValueError):
    """What a file holds can't be used. The message says why, without the file's name."""


def what_lies_at(path: Path) -> str:
    """Return what kind of thing a path is, in words: "a link to '/etc/passwd'", 'a named pipe'."""
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"a link to {os.readlink(path)!a}"  # noqa: PTH115 - Path.readlink would normalise it
    return f"a {KINDS.get(stat.S_IFMT(mode), 'device')}"


def open_file(path: Path, follow: bool = False) -> BinaryIO:
    """Open a file; `follow` a link only where the user gave the path. Raises OSError and CheckpointError."""
    mode = path.stat().st_mode if follow else path.lstat().st_mode
    if not stat.S_ISREG(mode):  # asked before it is opened: to open a device may do something already
        raise CheckpointError(f"{path}: is {what_lies_at(path)}, not a regular file")
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: is not a regular file any more")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, most: int = LARGEST, follow: bool = False) -> bytes:
    """Return the content of a file of at most so many bytes. Raises as `open_file` does."""
    with open_file(path, follow) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CheckpointError(f"{path}: is larger than {most:,} bytes, which no such file is")
    return content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError, and CheckpointError for what can't be used."""
    try:
        return parse_json(read_bytes(path))
    except ContentError as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Give each line of a file with its content. A line that a kill cut short is left out.

    Raises OSError, and CheckpointError for anything but a regular file, or for one that is no JSON.
    """
    left_out = 0
    with open_file(path) as file:
        while line := file.readline(LARGEST_LINE):
            try:
                yield line.decode().rstrip("\n"), parse_json(line)
            except ValueError:
                left_out += len(line)
                if left_out > LARGEST_LINE:
                    raise CheckpointError(f"{path}: damaged (not lines of JSON)") from None


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises OSError, and CheckpointError for what can't be used."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _refuse_repeated([str(key.value) for key, _ in node.value])
            if any(key.tag.endswith(":merge") for key, _ in node.value):  # each can double what is there
                raise ContentError("a merge of mappings")
            return super().construct_mapping(node, deep)

    content = read_bytes(path, LARGEST_YAML)
    try:
        found = yaml.load(content, Loader)
        _check_bounds(found)
    except Exception as error:  # of YAML's own kind, or of a number, a date or a key that can't be made
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: damaged ({lines[0]})") from None
    return found


def parse_json(text: bytes | str) -> Any:
    """Return what JSON holds. Raises ContentError for what no file of this project holds."""
    try:
        content = json.loads(text, object_pairs_hook=_as_dict)
        _check_bounds(content)
    except RecursionError:
        raise ContentError("nested too deeply") from None
    except ValueError as error:
        raise ContentError(str(error) if isinstance(error, ContentError) else "not JSON") from None
    return content


def _as_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        raise ContentError("a key stands there twice")


def _check_bounds(content: Any) -> None:
    """Raise ContentError for too many, too deep or too large values, and text that can't be written."""
    left, depth, level = MOST_VALUES, 0, [content]
    while level:
        depth, below = depth + 1, []
        for value in level:
            if isinstance(value, str):
                if NO_LETTER.search(value):
                    raise ContentError("text with a character that can't be written")
                continue
            if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
                raise ContentError("a number that is too large")
            if not isinstance(value, (dict, list, tuple, set)):
                continue
            left -= len(value)
            if left < 0 or depth > DEEPEST:
                raise ContentError("too many values" if left < 0 else "nested too deeply")
            below += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        level = below
