"""Run every command that the documents print, in sequence, in a fresh folder for each document.

The rule by which commands are shortened: the words of `SHORT` are appended to each command of that name, so
that it takes few steps with few images, and those of `SMALL` where it builds a model. Folders of /data/ lie
in the fresh folder, and initial weights there are as small. There, runs/NAME, FILE.pth and their like exist
as they are written.

What can't run here is in `ELSEWHERE` with the reason. Its configuration is composed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from deepvit_train import cli
from deepvit_train.commands import train, train_timm
from deepvit_train.config.compose import compose_command, compose_tree
from deepvit_train.config.from_timm import from_timm
from deepvit_train.config.preset import Architecture, model_preset
from deepvit_train.models import DeepViT
from tests.conftest import QUICK
from tests.documented import PAGES, ROOT, Documented, all_commands, commands_of

# Appended to every command of the name.
SHORT = {
    "train": [
        "trainer.max_steps=2",
        "trainer.batch_size=2",
        "trainer.eval_batch_size=2",
        "trainer.limit_batches=1",
        "trainer.calibrate_images=2",
        "trainer.threads=1",
        "data.workers=0",
        "collapse.images=2",
    ],
    "eval": ["batch_size=4", "limit_batches=1", "calibrate_images=4", "threads=1", "data.workers=0"],
    "predict": ["batch_size=4", "threads=1", "data.workers=0"],
    "analyze": ["collapse.images=2", "batch_size=2", "threads=1", "data.workers=0"],
    "export": [],
    "convert": [],
    "compare": ["threads=1"],
    "bench": ["repeats=1", "batch_size=1", "threads=1"],
    "data": ["threads=1"],
    "study": ["limit_cells=1", "threads=1", "train_images=60", "val_images=10", "search_images=4"],
}
# Appended where a model is built, but for sweeps over its depth.
SMALL = ["model.depth=2", "attn.from_block=0"]
SIX_HEADS = ["model.dim=48", "model.heads=6"]
# Commands whose page says that they end otherwise than well.
ENDS = {"deepvit-data check root=broken threads=1 data.workers=1": 4}
STUDY = ["study.depths=[2]", "study.attentions=[self]", "study.widths=[]", "study.seeds=[0]", "study.dim=96"]

WITH_COMMANDS = [page for page in PAGES if commands_of(page)]

# What does not run here, and why.
ELSEWHERE = {
    r"^make |^pip |^source ": "makes or uses an environment of packages, which needs the network",
    r"^tensorboard ": "serves until it is stopped",
    r"--nproc-per-node|--nnodes": "needs several GPUs or hosts",
    r"device=cuda|study=gpu|scripts\.bench_gpu": "needs a GPU",
    r"\$COMMON": "needs words that its page keeps in a variable of the shell, and minutes",
    r"=hf:": "needs the network",
    r"wandb": "needs packages that development goes without",
    r"out=runs/mine": "trains arms of 96 images a step; tests/commands/test_study.py types such arms",
    r"suite=imagenet": "needs ImageNet's test sets; tests/commands/test_evaluate_suite.py imitates them",
    r"=timm:|vit_s\.safetensors": "needs weights of timm: a file of its cache, or the network",
    r"python train\.py": "is timm's own script",
    r"study=imagenet": "trains each cell for 300 epochs, which no key of a study shortens",
    r"compare_optimizers": "trains 70 models; tests/scripts/test_compare_optimizers.py counts them",
    r"sort_imagenet_val": "needs ImageNet; tests/scripts/test_sort_imagenet_val.py runs it on its own files",
    r"fashion-mnist": "needs the package dataset-fashion-mnist; tests/commands/test_data_folder.py checks it",
    r"scripts\.architecture": "writes a page of this folder; tests/test_architecture.py compares it",
    r"gated": "needs the page's own module; tests/models/test_new_attention.py writes it",
}


def elsewhere(command: Documented) -> str | None:
    """Return why a command does not run here, or None if it does."""
    return next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, command.text)), None)


@pytest.fixture(scope="module")
def stage(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: data sets, weights files and finished runs."""
    folder = tmp_path_factory.mktemp("stage")
    rng = np.random.default_rng(0)
    sets = {"flowers": (64, 48), "imagenet": (64, 48), "fashion": (28, 28)}
    for name, size in sets.items():
        many = 40 if name == "fashion" else 10  # a study trains 50 images a step
        for split, count in (("train", many), ("val", 5)):
            for label in ("daisy", "rose"):
                images = folder / "data" / name / split / label
                images.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(images / f"{number}.png")
    shutil.copytree(folder / "data" / "flowers" / "train", folder / "data" / "pets")
    for file in (folder / "data" / "pets").rglob("*.png"):
        scan = folder / "data" / "scans" / file.parent.name / f"patient{file.stem}_1.png"
        scan.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, scan)
    (folder / "data" / "shards").mkdir()
    for split in ("train", "val"):
        with tarfile.open(folder / "data" / "shards" / f"{split}.tar", "w") as tar:
            tar.add(folder / "data" / "flowers" / split, arcname=split)
    shutil.copytree(folder / "data" / "flowers" / "val", folder / "FOLDER")
    shutil.copytree(folder / "data" / "flowers" / "val", folder / "holiday")
    shutil.copytree(folder / "data" / "pets", folder / "photographs")
    broken = folder / "broken"
    shutil.copytree(folder / "data" / "flowers", broken)
    (broken / "train" / "rose" / "9.png").write_bytes(b"")
    runs = {"NAME": [], "OTHER": ["attn=self"], "PLAIN": ["attn=self", *SIX_HEADS]}
    runs |= {"A": [], "B": ["seed=1"], "C": ["attn=self"]}
    runs |= {f"plain-s{seed}": ["attn=self", f"seed={seed}"] for seed in range(3)}
    runs |= {f"deep-s{seed}": ["model.depth=3", f"seed={seed}"] for seed in range(3)}
    for name, model in runs.items():
        run_dir = folder / "runs" / name
        train.run(compose_command("train", [*QUICK, *model, f"name={name}", f"run_dir={run_dir}"]))
    torch.save(DeepViT(model_preset("deepvit_s"), 2).state_dict(), folder / "FILE.pth")
    for name in ("deepvit_s", "deepvit_l"):
        torch.save(DeepViT(small(name), 2).state_dict(), folder / f"{name}.pth.tar")
    save_file(DeepViT(small("vit_small"), 2).state_dict(), folder / "FILE.safetensors")
    return folder


def small(preset: str) -> Architecture:
    """Return a preset as SMALL makes it."""
    full = model_preset(preset)
    return Architecture(replace(full.model, depth=2), replace(full.attn, from_block=0))


@pytest.fixture
def fresh(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh working folder with the stage in it."""
    for each in stage.iterdir():
        if each.name == "runs":
            shutil.copytree(each, tmp_path / "runs", symlinks=True)
        elif each.is_dir():
            shutil.copytree(each, tmp_path / each.name)
        else:
            (tmp_path / each.name).hardlink_to(each)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def shortened(command: Documented) -> list[str]:
    """Return the words of a command with those appended that shorten it."""
    words = [re.sub(r"(^|[= ])/data/", r"\1data/", word) for word in command.words]
    name = words[0]
    added = list(SHORT[name])
    given = {word.partition("=")[0] for word in words}
    sweeps = "-m" in words
    if name in ("train", "bench") and not sweeps and "vary" not in given:
        added += SMALL
    if name == "bench":
        added += ["values=[1,2]"] if "vary=model.depth" in words else []
        added += ["values=[32,64]"] if "vary=model.image_size" in words else []
    if name == "study":
        added += STUDY
    if name == "data":
        added = ["data.workers=0", "batch_size=2", *SMALL, *added] if words[1] == "check" else []
    return [*words, *added]


def run(words: list[str]) -> int:
    """Run a command in this process. Returns its exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    return int(end.value.code or 0)


def expanded(word: str, folder: Path) -> list[str]:
    """Return the paths in a folder that a word with a star stands for, as the shell does, or the word."""
    found = sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else []
    return found or [word]


def compose(command: Documented) -> None:
    """Compose the configuration of a command that does not run here, if it is one of this project."""
    words = command.words
    if "deepvit_train.cli" in command.text or command.text.startswith("deepvit-"):
        name, rest = words[0], [word for word in words[1:] if not word.startswith("$")]
        if name == "data":
            name, rest = f"data-{rest[0]}", rest[1:]
        rest = [word.replace("gated_reattention", "reattention") for word in rest if "=" in word]
        if "-m" in words:  # the first run of several
            rest = [word.partition(",")[0] for word in rest]
        compose_tree(name, [word for word in rest if not word.startswith("-")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands_of(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_commands_of_a_page_run_in_sequence(page: Path, fresh: Path) -> None:
    for command in commands_of(page):
        if "--from-timm" in command.words:
            assert from_timm(command.words[2:], lambda: train_timm)
            assert run(command.words) == 0
        elif elsewhere(command):
            compose(command)
        elif not command.is_ours:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            words = [sys.executable, *command.words[1:]]
            subprocess.run(words, cwd=fresh, env=environment, check=True, timeout=600)
        else:
            print("$", command.text, flush=True)
            words = [each for word in shortened(command) for each in expanded(word, fresh)]
            assert run(words) == ENDS.get(command.text, 0), command.text


def test_what_does_not_run_here_is_told_with_a_reason_that_is_needed() -> None:
    commands = all_commands()
    for pattern in ELSEWHERE:
        assert any(re.search(part, each.text) for part in pattern.split("|") for each in commands), pattern
    ours = [each for each in commands if each.is_ours]
    assert len([each for each in ours if elsewhere(each) is None]) > 0.7 * len(ours)


def test_two_commands_never_write_one_run() -> None:
    runs: dict[str, str] = {}
    for command in all_commands():
        words = command.words
        if words[0] != "train" or {"-m", "--from-timm", "$COMMON"} & set(words):
            continue
        rest = [word.replace("gated_reattention", "reattention") for word in words[1:]]
        run_dir = str(compose_tree("train", rest).run_dir)
        assert runs.setdefault(run_dir, str(sorted(rest))) == str(sorted(rest)), (run_dir, command.text)


def test_commands_of_pages_name_their_run() -> None:
    for command in all_commands():
        words = command.words
        # What --from-timm prints is the answer to a question, and names no run.
        answer = "model=deit_tiny attn=self augment=basic" in command.text
        if words[0] != "train" or answer or {"-m", "--from-timm", "$COMMON"} & set(words):
            continue
        if command.page.endswith(".md"):  # an experiment's own name is in its file
            assert any(word.startswith("name=") for word in words), command.text
