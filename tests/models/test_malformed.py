"""Malformed weights files end with exit code 3 and one line, and nothing in them is executed.

Each number from 0 on stands for one file. Its format, its fault and all random draws follow from the number.
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as as_safetensors

from deepvit_train.error import CheckpointError
from deepvit_train.models import load_model
from tests.conftest import Command
from tests.models.test_public import SHAPE, State, built, to_google

QUICK, ALL = 48, 1000
TRACE = "executed"  # the file that a pickle would write
Fault = Callable[[random.Random, State], State]


class Runs:
    """What unpickling would run."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> object:
        return open, (self.file, "w")


def _some(draw: random.Random, state: State) -> str:
    return draw.choice(sorted(state))


def without_a_key(draw: random.Random, state: State) -> State:
    optional = ("head", "blocks.0.attn.qkv.bias")  # other models have none
    needed = sorted(name for name in state if not name.startswith(optional))
    name = draw.choice(needed)
    return {each: value for each, value in state.items() if each != name}


def with_a_key(draw: random.Random, state: State) -> State:
    odd = [
        "",
        "\x1b[31m",
        "a\nb",
        "blocks.0",
        "blocks.999999999.norm1.weight",
        "x" * 5000,
        "../../etc/passwd",
    ]
    odd += [
        "blocks.0.attn.theta",
        "blocks.0.gamma_1",
        "patch_embed.conv1.weight",
        "visual.class_embedding",
        "head.weight.weight",
    ]
    odd += ["radio_model.model.patch_generator.embedder.weight", "mask_tokens", "teacher.blocks.0.a"]
    return state | {draw.choice(odd): torch.ones(draw.choice([1, 24]))}


def with_another_name(draw: random.Random, state: State) -> State:
    name = draw.choice(sorted(name for name in state if len(name) > 10))
    letters = list(name)
    letters[draw.randrange(len(letters))] = draw.choice("qwxyz_0/\x00é")
    changed = {"".join(letters) if each == name else each: value for each, value in state.items()}
    return changed if "".join(letters) != name else with_a_key(draw, state)


def with_another_shape(draw: random.Random, state: State) -> State:
    name, way = _some(draw, state), draw.randrange(6)
    value = state[name]
    shapes = [(), (0,), (1, *value.shape), (*value.shape, 2), value.shape[:-1], (2 * value.shape[0] + 1,)]
    return state | {name: torch.ones(shapes[way])}


def with_another_type(draw: random.Random, state: State) -> State:
    name = _some(draw, state)
    kind = draw.choice([torch.int64, torch.bool, torch.complex64, torch.uint8])
    return state | {name: state[name].to(kind)}


def with_a_hole(draw: random.Random, state: State) -> State:
    name = _some(draw, state)
    value = state[name].clone()
    value.view(-1)[draw.randrange(value.numel())] = draw.choice([float("nan"), float("inf")])
    return state | {name: value}


FAULTS = (
    without_a_key,
    with_a_key,
    with_another_name,
    with_another_shape,
    with_another_type,
    with_a_hole,
)


def with_a_stranger(draw: random.Random, state: State) -> State:
    """Something that is no tensor, where only torch's formats can hold it."""
    deep: Any = {}
    for _ in range(draw.choice([1, 50])):
        deep = {"model": deep}
    strangers = [None, 3, "text", b"\x00", [torch.ones(2)], {"a": 1}, (1, 2), deep, Runs(TRACE)]
    key = draw.choice(["blocks.0.norm1.weight", "model", "state_dict", 7, None, ("a",), "teacher"])
    return state | {key: draw.choice(strangers)}


def spoilt(draw: random.Random, content: bytes) -> bytes:
    """Bytes that were cut, overwritten, repeated or moved, at the places that say what the file holds."""
    way, place = draw.randrange(6), draw.randrange(len(content))
    if way == 0:
        return content[: max(1, place)]
    if way == 1:
        return content[:40] + content[40 + draw.randrange(1, 400) :]
    if way == 2:
        head = bytearray(content[:200])
        for _ in range(draw.choice([2, 20])):
            head[draw.randrange(len(head))] ^= draw.randrange(1, 256)
        return bytes(head) + content[200:]
    if way == 3:
        return draw.randbytes(draw.choice([1, 8, 500, 5000]))
    if way == 4:
        return content[: len(content) // 2] + draw.randbytes(64) + content[len(content) // 2 :]
    return content[:8] + draw.randbytes(8) + content[16 : max(17, place)]


def written(kind: str, state: State) -> bytes:
    file = io.BytesIO()
    if kind == "safetensors":
        return as_safetensors({name: value.contiguous() for name, value in state.items()})
    if kind == "npz":
        np.savez(file, **{name: value.numpy() for name, value in state.items()})  # pyright: ignore
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "pth")
    return file.getvalue()


def sound(kind: str) -> State:
    """A state that loads, in the form of a format."""
    model = built(depth=1)
    if kind == "npz":
        return {name: torch.from_numpy(value.copy()) for name, value in to_google(model, False).items()}
    return model.state_dict()


SOUND = {kind: sound(kind) for kind in ("pth", "legacy", "safetensors", "npz")}


def malformed(number: int) -> tuple[str, bytes, bool]:
    """Return a file's format and content, and whether only bytes were spoilt, so that it may still load."""
    draw = random.Random(number)
    kind = draw.choice(list(SOUND))
    state = SOUND[kind]
    fault = draw.choice([*FAULTS, *FAULTS, spoilt, spoilt, spoilt, with_a_stranger])
    if fault is spoilt:
        return kind, spoilt(draw, written(kind, state)), True
    if fault is with_a_stranger and kind in ("pth", "legacy"):
        return kind, written(kind, with_a_stranger(draw, state)), False
    try:
        return kind, written(kind, (with_a_hole if fault is with_a_stranger else fault)(draw, state)), False
    except (ValueError, TypeError, UnicodeError):  # the format itself can't hold this
        return kind, spoilt(draw, written(kind, state)), True


def suffix(kind: str) -> str:
    return "pth" if kind == "legacy" else kind


def test_what_is_spoilt_was_sound(tmp_path: Path) -> None:
    for kind, state in SOUND.items():
        file = tmp_path / f"sound.{suffix(kind)}"
        file.write_bytes(written(kind, state))
        assert load_model(file, heads=4).num_classes == SHAPE["num_classes"]


@pytest.mark.parametrize("number", range(QUICK))
def test_a_malformed_file_is_refused_in_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert outcome(number, tmp_path) in ("refused", "loaded")


def outcome(number: int, folder: Path) -> str:
    kind, content, may_load = malformed(number)
    file = folder / f"{number}.{suffix(kind)}"
    file.write_bytes(content)
    message = refusal(file)
    assert message is not None or may_load, number
    assert len((message or "").splitlines()) < 2, number
    assert not Path(TRACE).exists(), number
    file.unlink()
    return "loaded" if message is None else "refused"


def refusal(file: Path) -> str | None:
    try:
        load_model(file, heads=4)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.slow
def test_a_thousand_malformed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that load were spoilt where only numbers stand, which these formats can't show."""
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for number in range(10 * ALL):
        said.append(outcome(number, tmp_path))
        if said.count("refused") == ALL:
            break
    print(f"{len(said)} files: {said.count('refused')} refused, {said.count('loaded')} loaded")
    assert said.count("refused") == ALL
    assert said.count("loaded") < ALL / 10


@pytest.mark.parametrize("number", range(4))
def test_the_command_ends_with_3_and_no_traceback(number: int, call: Command, tmp_path: Path) -> None:
    fault = (spoilt, without_a_key, with_another_shape, with_a_stranger)[number]
    draw = random.Random(number)
    state = SOUND["pth"]
    if fault is with_a_stranger:
        content = pickle.dumps(Runs(TRACE))
    elif fault is spoilt:
        content = written("pth", state)[:500]
    else:
        content = written("pth", fault(draw, state))
    (tmp_path / "weights.pth").write_bytes(content)
    result = call("convert", "source=weights.pth", "out=converted", "heads=4")
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "converted").exists()
    assert not (tmp_path / TRACE).exists()
