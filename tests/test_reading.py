"""Read files that a stranger may have made: no link, no pipe, no size and no value is believed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from deepvit_train import reading
from deepvit_train.error import CheckpointError
from tests.fault.stranger import YAML_TEXTS, put_instead

NESTED = "[" * 15 + "]" * 15


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("link", "a link to '.*file', not a regular file"),
        ("loop", "a link to 'state.json', not"),
        ("device", "a link to '/dev/zero', not"),
        ("pipe", "a named pipe, not"),
        ("socket", "a socket, not"),
        ("folder", "a folder, not"),
    ],
)
def test_only_a_regular_file_is_opened_and_nothing_is_waited_for(
    tmp_path: Path, what: str, told: str
) -> None:
    (tmp_path / "file").write_text("{}")
    file = tmp_path / "state.json"
    put_instead(file, what, tmp_path)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"state\.json: is {told}") as error:
        reading.read_json(file)
    assert error.value.exit_code == 3
    assert time.monotonic() - began < 1


def test_a_link_that_the_user_named_is_followed_to_a_regular_file_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "link").symlink_to("file")
    assert reading.read_bytes(tmp_path / "link", follow=True) == b"{}"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to_pipe").symlink_to("pipe")
    for name in ("pipe", "to_pipe"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            reading.read_bytes(tmp_path / name, follow=True)


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    with file.open("wb") as opened:
        opened.truncate(2**40)  # takes no room on the disk
    for read in (reading.read_yaml, reading.read_json):
        with pytest.raises(CheckpointError, match="is larger than"):
            read(file)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"a": 1', "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + NESTED.encode() + b", [" + NESTED.encode() + b"]]", "nested too deeply"),
        (b'{"a": 1, "a": 1}', "a key stands there twice"),
        (b"[-18446744073709551616]", "a number that is too large"),
        (b'["\\ud800"]', "text with a character that can't be written"),
        (b'{"\\u0000": 1}', "text with a character that can't be written"),
        (b"[" + b"0," * 1_000_001 + b"0]", "too many values"),
    ],
)
def test_json_that_no_run_holds_is_refused(tmp_path: Path, text: bytes, told: str) -> None:
    file = tmp_path / "state.json"
    file.write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"state\.json: damaged \({told}\)"):
        reading.read_json(file)


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text('{"a": [1, NaN, "\\udcff"], "b": ' + NESTED + "}")
    content = reading.read_json(file)
    assert content["a"][0] == 1
    assert content["a"][1] != content["a"][1]
    assert content["a"][2] == "\udcff"  # a raw byte in the name of a file


@pytest.mark.parametrize("text", [each for each in YAML_TEXTS if each not in (b"- 1\n", b"1: 2\n")])
def test_yaml_is_plain_and_bounded(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text)
    began = time.process_time()
    if b"2001-01-01" in text:  # the schema refuses it
        reading.read_yaml(file)
        return
    with pytest.raises(CheckpointError, match=r"config\.yaml: damaged \(.+\)") as error:
        reading.read_yaml(file)
    assert len(str(error.value).splitlines()) == 1
    assert time.process_time() - began < 1


def test_an_alias_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &mean [0.5, 0.5]\nb: *mean\n")
    assert reading.read_yaml(tmp_path / "config.yaml") == {"a": [0.5, 0.5], "b": [0.5, 0.5]}


def test_lines_that_are_no_json_are_left_out_up_to_a_size(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, \n\n{"step": 3}\n[[[\n{"ste')
    assert list(reading.read_json_lines(file)) == [('{"step": 1}', {"step": 1}), ('{"step": 3}', {"step": 3})]
    with file.open("ab") as opened:
        opened.truncate(2**40)
    with pytest.raises(CheckpointError, match=re.escape("metrics.jsonl: damaged (not lines of JSON)")):
        list(reading.read_json_lines(file))
