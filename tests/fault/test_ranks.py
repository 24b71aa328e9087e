"""Start ranks with different commands, or different images: all end, with one code and a name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.distributed.world import World
from deepvit_train.error import UserError
from deepvit_train.training import ranks
from tests.conftest import QUICK, as_ranks, forked, slowly

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("ranks")]


def told(folder: Path, *of_each: list[str], in_own: bool = False) -> list[str]:
    """Train as ranks of which each has its own keys. Returns the exit code and the message of each."""

    def work() -> None:
        rank = int(os.environ["RANK"])
        said = folder / f"said-{rank}"
        if in_own:
            os.chdir(folder / str(rank))
        typed = [*QUICK, "trainer.timeout_s=100", f"run_dir={folder / 'run'}", *of_each[rank]]
        try:
            train.run(compose_command("train", typed))
            said.write_text("0")
        except UserError as error:
            said.write_text(f"{error.exit_code} {error}")

    assert as_ranks(len(of_each), work) == 0
    return [(folder / f"said-{rank}").read_text() for rank in range(len(of_each))]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("optim.lr=0.002", "optim.lr=0.001 on rank 0, optim.lr=0.002 on rank 1"),
        ("seed=1", "seed=0 on rank 0, seed=1 on rank 1"),
        slowly("augment.shift=0.1", "augment.shift=0.08 on rank 0, augment.shift=0.1 on rank 1"),
        slowly(
            "trainer.precision=bf16", "trainer.precision=fp32 on rank 0, trainer.precision=bf16 on rank 1"
        ),
        slowly("trainer.epochs=3", "trainer.epochs=2 on rank 0, trainer.epochs=3 on rank 1"),
    ],
)
def test_ranks_of_different_commands_do_not_train(
    other: str, named: str, digits: Path, tmp_path: Path
) -> None:
    first, second = told(tmp_path, [], [other])
    assert first == second
    assert first.startswith(f"2 {named}")
    assert not (tmp_path / "run").exists()


def test_ranks_of_different_versions_do_not_train(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def newer_on_rank_1(world: World, config: dict[str, object]) -> None:
        monkeypatch.setattr("deepvit_train.__version__", f"0.{world.rank}")
        check(world, config)

    check = ranks.check_config
    monkeypatch.setattr(ranks, "check_config", newer_on_rank_1)
    first, second = told(tmp_path, [], [])
    assert first == second
    version = "version of deepvit-train"
    assert first.startswith(f"2 {version}=0.0 on rank 0, {version}=0.1 on rank 1")


def renamed_image(root: Path) -> str:
    image = sorted((root / "train" / "3").iterdir())[0]
    image.rename(image.with_name("zz.png"))
    return f"4 train: image 428 is 3/{image.name} of class 3 on rank 0 and 3/"


def other_class(root: Path) -> str:
    for split in ("train", "val"):
        (root / split / "9").rename(root / split / "nine")
    return "4 class 9 is 9 on rank 0 and nine on rank 1"


def removed_image(root: Path) -> str:
    image = sorted((root / "val" / "9").iterdir())[-1]
    image.unlink()
    return f"4 val: image 363 is 9/{image.name} of class 9 on rank 0 and no image on rank 1 (of 364 and 363"


def other_content(root: Path) -> str:
    image = sorted((root / "train" / "0").iterdir())[0]
    image.write_bytes(image.read_bytes() + b"more")
    return f"4 train: image 0 is 0/{image.name} of class 0 with "


def no_data(root: Path) -> str:
    shutil.rmtree(root)
    return f"4 rank 1: data.root={root}: no such folder"


@pytest.mark.parametrize(
    "change", [removed_image, other_content, *map(slowly, [renamed_image, other_class, no_data])]
)
def test_ranks_of_different_images_do_not_train(change: object, digits: Path, tmp_path: Path) -> None:
    assert callable(change)
    roots = [tmp_path / "here" / "images", tmp_path / "there" / "pictures"]
    for root in roots:
        shutil.copytree(digits, root)
    named = change(roots[1])
    first, second = told(tmp_path, *([f"data.root={root}"] for root in roots))
    assert first == second
    assert first.startswith(named)
    assert not (tmp_path / "run").exists()


def test_ranks_of_different_weights_do_not_train(digits: Path, tmp_path: Path) -> None:
    """Here the same path, given from different working folders."""
    run = compose_command("train", [*QUICK, f"run_dir={tmp_path / 'first'}", "trainer.max_steps=2"])
    assert forked(lambda: train.run(run)) == 0
    content = (tmp_path / "first" / "checkpoints" / "last" / "model.safetensors").read_bytes()
    for rank, last in enumerate((content, content[:-1] + bytes([content[-1] ^ 1]))):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "weights.safetensors").write_bytes(last)
    first, second = told(tmp_path, *(["model.weights=weights.safetensors"] for _ in range(2)), in_own=True)
    assert first == second == "3 model.weights=weights.safetensors: is another file on rank 1 than on rank 0"
    assert not (tmp_path / "run").exists()


def test_where_a_rank_computes_and_reads_is_its_own(digits: Path, tmp_path: Path) -> None:
    roots = [tmp_path / "here" / "images", tmp_path / "there" / "pictures"]
    for root in roots:
        shutil.copytree(digits, root)
    own = [
        [f"data.root={roots[0]}", "name=a"],
        [
            f"data.root={roots[1]}",
            "data.workers=1",
            "trainer.timeout_s=90",
            "name=b",
            f"run_dir={tmp_path}/b",
        ],
    ]
    assert told(tmp_path, *own) == ["0", "0"]
    assert (tmp_path / "run" / "result.json").exists()
    assert not (tmp_path / "b").exists()


def test_a_folder_that_one_rank_may_not_use_ends_all(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letters.txt").write_text("")
    first, second = told(tmp_path, [], [])
    assert first == second
    assert first.startswith("6 rank 0: ")
    assert "holds letters.txt but no run" in first
