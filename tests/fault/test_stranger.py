"""A run's folder from a stranger: nothing outside it happens, and nothing in it ends in a traceback."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepvit_train import cli
from deepvit_train.cli import main
from deepvit_train.config.compose import compose_command
from deepvit_train.run.checkpoint import as_json
from tests.conftest import QUICK
from tests.fault import stranger
from tests.fault.stranger import put_instead, resign, snapshot

CODES = {0, 2, 3, 4, 5, 6}
LIMIT_S = 5.0
STUDY = [
    "study.depths=[2]",
    "study.seeds=[0]",
    "study.attentions=[self]",
    "study.widths=[]",
    "study.dim=16",
    "study.width_depth=2",
    "train=[model.image_size=8,model.patch_size=4,model.heads=2,augment=none,trainer.epochs=1,"
    "trainer.batch_size=10,schedule.warmup_epochs=0,trainer.calibrate_images=10,data.workers=0]",
    "study.rates=[]",
    "root=../images",
    "train_images=24",
    "val_images=6",
    "threads=1",
    "collapse.images=2",
]
TRAIN = [
    *QUICK,
    "attn=reattention",
    "run_dir=run",
    "data=imagefolder",
    "data.root=../images",
    "trainer.batch_size=8",
    "trainer.calibrate_images=8",
    "trainer.ema_decay=0.9",
]


class Hang(BaseException):
    """A command took too long."""


def small(digits: Path, folder: Path) -> None:
    """Write a data set of 3 classes, of 8 training and 2 validation images each."""
    for split, count in (("train", 8), ("val", 2)):
        for name in "012":
            (folder / split / name).mkdir(parents=True)
            for image in sorted((digits / split / name).iterdir())[:count]:
                shutil.copy(image, folder / split / name)


@pytest.fixture(scope="module")
def stored(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 8 of 12, and a study of one cell."""
    folder = tmp_path_factory.mktemp("stored") / "work"
    folder.mkdir()
    small(digits, folder.parent / "images")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for arguments in (
            ["train", *TRAIN, "trainer.epochs=4", "trainer.max_steps=4"],
            ["study", *STUDY, "out=study"],
        ):
            with pytest.raises(SystemExit) as end:
                main(arguments)
            assert not end.value.code
    return folder


Say = Callable[[], object]


def attempt(arguments: list[str], say: Say) -> tuple[int, float]:
    """Run a command in this process. Returns its exit code and the seconds of processor time it took.

    Whatever it raises leaves, as does Hang when it waits for something that never comes.
    """

    def stop(*_: object) -> None:
        raise Hang

    before, began = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 6 * LIMIT_S)  # other work of the machine slows a command down
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0), time.process_time() - began
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        say()
    raise AssertionError("the command did not exit")


@pytest.fixture
def place(
    stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[], Path]:
    """Return a function that puts copies of the stored folders and a folder `outside` into a new one."""

    def fresh() -> Path:
        folder = tmp_path / "work"
        if not (tmp_path / "images").exists():
            shutil.copytree(stored.parent / "images", tmp_path / "images")
            composed = cache(lambda command, overrides: compose_command(command, list(overrides)))
            monkeypatch.setattr(cli, "compose_command", lambda command, each: composed(command, tuple(each)))
        monkeypatch.chdir(tmp_path)
        # What a terminal can't show is another matter (test_terminal.py): here it becomes escapes.
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("run", "study"):
            shutil.copytree(stored / name, folder / name, symlinks=True)
        (folder / "outside").mkdir()
        (folder / "outside" / "file").write_text("as it was\n")
        (folder / "outside" / "folder").mkdir()
        monkeypatch.chdir(folder)
        return folder

    return fresh


def last(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step_0000004"


RESUME = ["train", *TRAIN, "trainer.epochs=4", "trainer.max_steps=6"]
EVAL = ["eval", "checkpoint=run", "limit_batches=1", "threads=1", "data.workers=0", "report=false"]
ANALYZE = ["analyze", "checkpoint=run", "threads=1", "data.workers=0", "collapse.images=2", "report=false"]


STUDIED = ["study", *STUDY, "out=study", "limit_cells=0"]


Change = Callable[[Path, random.Random], object]


def of_json(file: Callable[[Path], Path], signed: bool) -> Change:
    """Return a change of a JSON file: of its values, or of its text."""

    def change(folder: Path, rng: random.Random) -> None:
        path = file(folder)
        text = path.read_bytes()
        if rng.random() < 0.25:
            path.write_bytes(rng.choice(stranger.TEXTS)(text, rng))
        else:
            content = stranger.mutated(json.loads(text), rng)
            path.write_text(json.dumps(content, indent=1, sort_keys=signed) + "\n")
        if signed:
            resign(path.parent)

    return change


def of_manifest(folder: Path, rng: random.Random) -> None:
    file = last(folder) / "manifest.json"
    if rng.random() < 0.3:
        file.write_bytes(rng.choice(stranger.TEXTS)(file.read_bytes(), rng))
    else:
        file.write_text(
            json.dumps(stranger.mutated(json.loads(file.read_text()), rng), indent=1, sort_keys=True) + "\n"
        )


def of_description(folder: Path, rng: random.Random) -> None:
    for name in ("model", "ema"):
        file, raw = last(folder) / f"{name}.safetensors", rng.random() < 0.2
        seed = rng.random()

        def change(content: object, raw: bool = raw, seed: float = seed) -> object:
            own = random.Random(seed)
            if not raw:
                return stranger.mutated(content, own)
            return own.choice(stranger.TEXTS)(str(content).encode(), own).decode(errors="replace")

        stranger.change_description(file, change, raw)
    resign(last(folder))


def of_config(folder: Path, rng: random.Random) -> None:
    import yaml

    file = folder / "run" / "config.yaml"
    kind = rng.random()
    if kind < 0.3:
        file.write_bytes(rng.choice(stranger.YAML_TEXTS) + (file.read_bytes() if rng.random() < 0.5 else b""))
    elif kind < 0.5:
        file.write_bytes(rng.choice(stranger.TEXTS)(file.read_bytes(), rng))
    else:
        content = stranger.mutated(yaml.safe_load(file.read_text()), rng)
        file.write_bytes(yaml.safe_dump(content, sort_keys=False).encode(errors="surrogatepass"))


def of_metrics(folder: Path, rng: random.Random) -> None:
    file = folder / "run" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    place = rng.randrange(len(lines))
    if rng.random() < 0.4:
        changed = rng.choice(stranger.TEXTS)(lines[place].encode(), rng)
    else:
        changed = json.dumps(stranger.mutated(json.loads(lines[place]), rng)).encode()
    file.write_bytes(b"\n".join([*(line.encode() for line in lines[:place]), changed, b""]))


def of_kind(folder: Path, rng: random.Random) -> None:
    """Put something else in the place of any file or folder of the run."""
    entries = sorted(path for path in (folder / "run").rglob("*") if "tfevents" not in path.name)
    what = rng.choice(["link", "dangling", "loop", "device", "pipe", "socket", "folder"])
    put_instead(rng.choice(entries), what, folder / "outside")


def mutations() -> list[tuple[str, Change, list[str], int]]:
    """Return what is changed, how, the command that meets it, and its share of all mutations."""
    state = of_json(lambda folder: last(folder) / "state.json", signed=True)
    cell = of_json(lambda folder: next((folder / "study" / "cells").glob("*.json")), signed=False)
    settings = of_json(lambda folder: folder / "study" / "settings.json", signed=False)
    environment = of_json(lambda folder: folder / "run" / "environment.json", signed=False)
    return [
        ("state, resumed", state, RESUME, 20),
        ("state, evaluated", state, EVAL, 12),
        ("manifest, resumed", of_manifest, RESUME, 8),
        ("manifest, evaluated", of_manifest, EVAL, 4),
        ("description, resumed", of_description, RESUME, 6),
        ("description, evaluated", of_description, EVAL, 10),
        ("config", of_config, RESUME, 10),
        ("metrics", of_metrics, RESUME, 6),
        ("environment", environment, RESUME, 2),
        ("settings", settings, STUDIED, 6),
        ("cell", cell, STUDIED, 6),
        ("another thing, resumed", of_kind, RESUME, 6),
        ("another thing, evaluated", of_kind, EVAL, 2),
        ("another thing, analysed", of_kind, ANALYZE, 2),
    ]


Found = Counter[tuple[str, int]]


def fuzz(count: int, seed: int, place: Callable[[], Path], say: Say) -> Found:
    """Make so many mutations. Returns how often which exit code followed, and raises what was not held."""
    kinds = mutations()
    wrong: list[str] = []
    found = Found()
    shares = [share for *_, share in kinds]
    order = random.Random(seed).choices(kinds, shares, k=count)
    for number, (name, change, arguments, _) in enumerate(order):
        folder = place()
        rng = random.Random(f"{seed} {number}")
        told = f"{name}, seed {seed}, number {number}"
        change(folder, rng)
        before = snapshot(folder / "outside")
        try:
            code, seconds = attempt(arguments, say)
        except BaseException as error:
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else "?"
            wrong.append(f"{told}: {type(error).__name__} at {where}: {str(error)[:150]}")
            if isinstance(error, KeyboardInterrupt):
                raise
            continue
        found[name, code] += 1
        if code not in CODES:
            wrong.append(f"{told}: exit code {code}")
        if seconds > LIMIT_S:
            wrong.append(f"{told}: {seconds:.1f} s of processor time")
        if snapshot(folder / "outside") != before:
            wrong.append(f"{told}: something outside was touched")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)
    return found


def test_mutations_of_all_files(place: Callable[[], Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = fuzz(60, 0, place, capsys.readouterr)
    assert {code for _, code in found} >= {0, 3}


@pytest.mark.slow
def test_two_thousand_mutations_of_all_files(
    place: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = fuzz(2000, 1, place, capsys.readouterr)
    assert {name for name, _ in found} == {name for name, *_ in mutations()}
    by_code = Counter[int]()
    for (_, code), times in found.items():
        by_code[code] += times
    with capsys.disabled():
        print(f"\nexit codes: {dict(sorted(by_code.items()))}")


def ended(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process. Returns its exit code, and its message where it failed."""
    with pytest.MonkeyPatch.context() as patched:
        errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        patched.setattr(sys, "stderr", errors)
        code, _ = attempt(arguments, lambda: None)
        errors.flush()
        told = cast(io.BytesIO, errors.buffer).getvalue().decode()
    said = capsys.readouterr().out
    assert "Traceback" not in told + said
    assert len(told.splitlines()) <= 2
    return code, told


# What lies in the folder of a run, what a stranger put there, the command, its exit code, and its message.
PLANTED = [
    ("checkpoints", "link", RESUME, 6, "run/checkpoints: is a link to '.*moved-checkpoints'; nothing"),
    ("checkpoints", "link", EVAL, 3, "run/checkpoints: is a link, not a folder"),
    ("tb", "link", RESUME, 6, "run/tb: is a link to '.*moved-tb'; nothing is written there, so remove it"),
    ("images", "link", RESUME, 6, "run/images: is a link to '.*moved-images'; nothing is written there"),
    ("analysis", "link", ANALYZE, 6, "run/analysis: is a link to '.*outside/file'; nothing is written there"),
    ("analysis", "dangling", ANALYZE, 6, "run/analysis: is a link to '.*outside/absent'; nothing is written"),
    (".lock", "link", RESUME, 6, r"run/\.lock: is a link to '.*outside/file'; nothing is written there"),
    (".lock", "pipe", RESUME, 6, r"run/\.lock: is a named pipe; nothing is written there"),
    ("config.yaml", "link", RESUME, 3, r"run/config\.yaml: is a link to '.*', not a regular file"),
    ("config.yaml", "pipe", RESUME, 3, r"run/config\.yaml: is a named pipe, not a regular file"),
    ("environment.json", "link", RESUME, 6, r"run/environment\.json: is a link to '.*outside/file'; nothing"),
    ("environment.json", "pipe", RESUME, 6, r"run/environment\.json: is a named pipe; nothing is written"),
    ("metrics.jsonl", "link", RESUME, 3, r"run/metrics\.jsonl: is a link to '.*/file', not a regular"),
    ("metrics.jsonl", "pipe", RESUME, 3, r"run/metrics\.jsonl: is a named pipe, not a regular file"),
    ("metrics.jsonl", "device", RESUME, 3, r"run/metrics\.jsonl: is a link to '/dev/zero', not a regular"),
    ("result.json", "link", RESUME, 6, r"run/result\.json: is a link to '.*outside/file'; nothing"),
    ("checkpoints/best", "link", EVAL, 3, "/best: is a link to '.*', not to a checkpoint beside it"),
    ("checkpoints/best", "loop", EVAL, 3, "/best: is a link to 'best', not to a checkpoint beside"),
    ("checkpoints/step_0000004", "link", EVAL, 3, "/best: is a link to 'step_0000004', not to a checkp"),
    ("checkpoints/step_0000004/model.safetensors", "link", EVAL, 3, "model.safetensors: damaged .*is a link"),
    ("checkpoints/step_0000004/model.safetensors", "pipe", EVAL, 3, "model.safetensors: is a named pipe, n"),
    ("checkpoints/step_0000004/state.json", "socket", EVAL, 3, "state.json: is a socket, not a regular file"),
    ("checkpoints/step_0000004/manifest.json", "pipe", EVAL, 3, "manifest.json: is a named pipe, not a reg"),
    ("checkpoints/step_0000004/manifest.json", "link", EVAL, 3, "manifest.json: is a link to '.*', not a "),
    ("checkpoints/step_0000004.ema.val.json", "link", EVAL, 6, "val.json: is a link to '.*/file'; nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "what", "arguments", "code", "told"), PLANTED)
def test_what_a_stranger_planted_is_refused_and_named(
    path: str,
    what: str,
    arguments: list[str],
    code: int,
    told: str,
    place: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = place()
    put_instead(folder / "run" / path, what, folder / "outside")
    before = snapshot(folder / "outside")
    assert ended(arguments, capsys)[0] == code
    found = ended(arguments, capsys)  # and again: nothing was mended by a start
    assert found[0] == code
    assert re.search(told, found[1]), found[1]
    assert snapshot(folder / "outside") == before


def test_a_result_under_the_name_of_a_temporary_file_is_not_followed(
    place: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Names that could be foreseen in version 0.1.0, planted as links to a file outside."""
    folder = place()
    checkpoints = folder / "run" / "checkpoints"
    for name in (".step_0000004.ema.val.json.partial", ".partial-step_0000006", ".partial-last"):
        (checkpoints / name).symlink_to("../../outside/file")
    for name in (".config.yaml.partial", ".environment.json.partial", ".metrics.jsonl.partial"):
        (folder / "run" / name).symlink_to("../outside/file")
    before = snapshot(folder / "outside")
    assert ended(EVAL, capsys) == (0, "")
    assert ended(RESUME, capsys) == (0, "")
    assert snapshot(folder / "outside") == before
    assert json.loads((checkpoints / "step_0000004.ema.val.json").read_text())["images"] == 6


def test_what_the_manifest_does_not_list_is_not_read(
    place: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place()
    kept = last(folder).parent.parent.parent / "kept"
    last(folder).rename(kept)
    (folder / "alone").mkdir()
    for name in ("model.safetensors", "state.json", "manifest.json"):
        shutil.copy(kept / name, folder / "alone" / name)
    resign(folder / "alone")
    evaluate = ["eval", "checkpoint=alone", *EVAL[2:], "calibrate_images=8"]
    assert ended(evaluate, capsys) == (0, "")
    expected = (folder / "alone.live.val.calibrated8.json").read_text()
    (folder / "alone" / "ema.safetensors").symlink_to(kept / "ema.safetensors")
    shutil.copy(kept / "calibrated.safetensors", folder / "alone")
    assert ended(evaluate, capsys) == (0, "")
    again = json.loads((folder / "alone.live.val.calibrated8.json").read_text())
    assert {**again, "images_per_s": 0} == {**json.loads(expected), "images_per_s": 0}
    code, told = ended([*evaluate, "weights=ema"], capsys)
    assert code == 3
    assert "alone: holds no ema weights; nearest: weights=auto" in told


def test_copies_and_links_that_are_meant_are_taken(
    place: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run under a link, a copy that followed its links, and weights that are a link, as in a cache."""
    folder = place()
    (folder / "elsewhere").symlink_to("run")
    assert ended(["eval", "checkpoint=elsewhere", *EVAL[2:]], capsys) == (0, "")
    shutil.copytree(folder / "run", folder / "copy", symlinks=False)
    assert (folder / "copy" / "checkpoints" / "last").is_dir()
    assert ended(["eval", "checkpoint=copy", *EVAL[2:]], capsys) == (0, "")
    (folder / "cache").mkdir()
    shutil.copy(last(folder) / "ema.safetensors", folder / "blob")
    (folder / "cache" / "model.safetensors").symlink_to("../blob")
    data = ["data=imagefolder", "data.root=../images", "calibrate_images=8"]
    for path in ("cache", "cache/model.safetensors"):
        assert ended(["eval", f"checkpoint={path}", *EVAL[2:], *data], capsys) == (0, "")


def _cast(name: str, kind: torch.dtype) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(kind)})


def _filled(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[-1].fill_(value)


WEIGHT = "blocks.1.mlp.fc1.weight"
TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], list[str], str]] = [
    ("model", _cast(WEIGHT, torch.complex64), RESUME, f"number type: {WEIGHT} is complex64, not float32"),
    ("model", _cast(WEIGHT, torch.int8), RESUME, f"{WEIGHT} is int8, not float32"),
    ("model", _cast(WEIGHT, torch.float16), RESUME, f"{WEIGHT} is float16, not float32"),
    ("model", _filled(WEIGHT, float("nan")), RESUME, f"holds NaN or infinite values: {WEIGHT}"),
    ("ema", _filled(WEIGHT, float("inf")), RESUME, f"holds NaN or infinite values: {WEIGHT}"),
    ("model", lambda tensors: tensors.pop(WEIGHT), RESUME, f"does not fit the model (missing: {WEIGHT})"),
    ("optimizer", lambda tensors: tensors.pop(f"exp_avg.{WEIGHT}"), RESUME, f"missing: exp_avg.{WEIGHT})"),
    ("optimizer", lambda tensors: tensors.clear(), RESUME, "missing: step."),
    ("optimizer", _filled(f"exp_avg.{WEIGHT}", float("nan")), RESUME, f"infinite values: exp_avg.{WEIGHT}"),
    ("optimizer", lambda tensors: tensors.update(x=torch.ones(1)), RESUME, "not read: x"),
    ("calibrated", lambda tensors: tensors.update({"live.x": torch.ones(3)}), RESUME, "holds 'live.x', "),
    ("ema", _cast(WEIGHT, torch.complex64), EVAL, f"{WEIGHT} is complex64, not float32"),
    ("ema", _cast(WEIGHT, torch.int8), EVAL, f"{WEIGHT} is int8, not float32"),
    ("ema", _filled(WEIGHT, float("-inf")), EVAL, f"holds NaN or infinite values: {WEIGHT}"),
    ("calibrated", lambda tensors: tensors.update({"ema.x": torch.ones(1)}), EVAL, "holds 'ema.x', which"),
    (
        "calibrated",
        lambda tensors: tensors.update({"ema.blocks.0.attn.norm.running_var": torch.ones(())}),
        EVAL,
        "blocks.0.attn.norm.running_var is (), not (2,)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "arguments", "told"), TENSORS)
def test_tensors_are_those_of_the_model(
    name: str,
    change: Callable[[dict[str, torch.Tensor]], object],
    arguments: list[str],
    told: str,
    place: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = place()
    file = last(folder) / f"{name}.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=header)
    resign(last(folder))
    code, said = ended(arguments, capsys)
    assert code == 3
    assert told in said
    assert f"{name}.safetensors" in said


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("step", -1, "step is not a whole number from 0 on"),
        ("step", 1.5, "step is not a whole number from 0 on"),
        ("metrics", [1], "metrics is not values under names"),
        ("metrics", {"val/top1": None}, "metrics.val/top1 is not a number"),
        ("best", {"step": 1}, "best is not an evaluation"),
        ("scaler", {"scale": 0}, "scaler is not a loss scaler"),
        ("data_root", 3, "data_root is not a path or null"),
        ("images", {"train": {"images": 1, "digest": "../x"}}, "images.train.digest is not a digest"),
        ("losses", 1, "losses is not a list"),
        ("bad_files", [[]], "bad_files.0 is not text"),
        ("learning_rate", float("nan"), "learning_rate is not a finite number or null"),
        ("format", 2, "format 2; this version reads 1"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_with_its_key(
    key: str,
    value: object,
    told: str,
    place: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = place()
    file = last(folder) / "state.json"
    file.write_text(as_json(json.loads(file.read_text()) | {key: value}))
    resign(last(folder))
    for arguments in (RESUME, EVAL):
        code, said = ended(arguments, capsys)
        assert code == 3
        assert f"state.json: damaged ({told})" in said or (key == "format" and told in said)
