"""Classes are matched by name wherever a model meets data: no order matters, and other names are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from tests.conftest import Command, slowly
from tests.twelve import LEARN, TWELVE, classes_of, pack, reorder, write_classes

FRUIT = ["apple", "Banana", "cherry", "Date"]
# A run that does not learn, which shows what its initial weights are worth.
STILL = ["trainer.max_steps=1", "optim.lr=1e-12", "schedule.min_lr=0"]
# What the tensors of a run on digits do not show.
DIGITS = ["heads=4", "mean=[0.5,0.5,0.5]", "std=[0.5,0.5,0.5]", "crop_pct=1.0"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """d12, the same as t12 in tar files, and a run that learnt them."""
    home = tmp_path_factory.mktemp("twelve")
    write_classes(home / "d12", TWELVE)
    pack(home / "d12", home / "t12")
    done = train.run(compose_command("train", [*LEARN, f"data.root={home}/d12", f"run_dir={home}/r"]))
    assert done["val/top1"] == 1.0
    return home


@pytest.fixture
def here(home: Path, call: Command) -> Path:
    """A copy of it, which is the current folder."""
    for name in ("d12", "t12", "r"):
        shutil.copytree(home / name, name, symlinks=True)
    return Path()


def result_of(done: CompletedProcess[str]) -> dict[str, Any]:
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rename(*names: tuple[str, str]) -> None:
    for split in ("train", "val"):
        for old, new in names:
            Path("d12", split, old).rename(Path("d12", split, new))


def test_a_tar_file_of_the_same_images_evaluates_the_same(here: Path, call: Command) -> None:
    tar = result_of(call("eval", "checkpoint=r", "data=tar", "data.root=t12", "threads=1"))
    folder = result_of(call("eval", "checkpoint=r", "data=imagefolder", "data.root=d12", "threads=1"))
    assert (tar["top1"], tar["loss"]) == (1.0, folder["loss"])
    assert tar["labels"] == {
        "matched_by": "name",
        "outputs": 12,
        "classes": 12,
        "restricted_to_present": False,
        "class_map": None,
    }


def test_every_command_takes_the_same_order(here: Path, call: Command) -> None:
    more = [*LEARN, "trainer.max_steps=1", "attn=self"]
    for name, root in (("imagefolder", "d12"), ("tar", "t12")):
        assert call("train", *more, f"data={name}", f"data.root={root}", f"run_dir=of_{name}").returncode == 0
        assert classes_of(Path(f"of_{name}/checkpoints/last/model.safetensors")) == sorted(TWELVE)
    call("analyze", "checkpoint=r", "data=tar", "data.root=t12", "accuracy=true", "report=false", "threads=1")
    (model,) = json.loads(Path("r/analysis/analysis.json").read_text())["models"]
    assert model["accuracy"]["calibrated"]["top1"] == 1.0
    assert model["accuracy"]["labels"]["matched_by"] == "name"
    assert result_of(call("convert", "source=r", "out=c"))["classes"] == 12
    assert result_of(call("eval", "checkpoint=c", "data=tar", "data.root=t12", "threads=1"))["top1"] == 1.0


def test_a_run_of_another_order_keeps_it(here: Path, call: Command) -> None:
    last = Path("r/checkpoints/last").resolve()
    reorder(last, TWELVE)  # as versions before numbered tar files
    Path("r/checkpoints/best").unlink()
    assert result_of(call("eval", "checkpoint=r", "threads=1"))["top1"] == 1.0
    assert result_of(call("eval", "checkpoint=r", "data=tar", "data.root=t12", "threads=1"))["top1"] == 1.0
    on = call("train", *LEARN, "data.root=d12", "run_dir=r", "trainer.epochs=7")
    assert not on.returncode, on.stderr
    assert "d12/train: classes are matched by name; the model's order is 0, 1, 2, 3, 4, ..." in on.stdout
    result = json.loads(Path("r/result.json").read_text())
    assert result["val/top1"] == 1.0
    assert result["val/loss"] < 0.5
    assert classes_of(Path("r/checkpoints/last/model.safetensors")) == TWELVE
    weights = f"model.weights={Path('r/checkpoints/last').resolve()}"
    start = call("train", *LEARN, "data.root=d12", "run_dir=w", weights, *STILL)
    assert "rows of the head taken by name, of which the file's order is 0, 1, 2, 3, 4, ..." in start.stdout
    assert json.loads(Path("w/result.json").read_text())["val/top1"] == 1.0


@pytest.mark.parametrize(
    "start",
    [
        ["run_dir=r", "trainer.epochs=7"],  # an ongoing run
        ["run_dir=r"],  # a finished one
        ["run_dir=new", "resume=r"],
    ],
)
def test_a_renamed_folder_is_refused_and_both_names_are_given(
    here: Path, call: Command, start: list[str]
) -> None:
    rename(("0", "zero"))
    before = sorted((str(file), file.stat().st_mtime_ns) for file in Path("r").rglob("*") if file.is_file())
    refused = call("train", *LEARN, "data.root=d12", *start)
    assert refused.returncode == 4
    assert "(unknown to the model: zero; missing: 0)" in refused.stderr
    assert "class_map" in refused.stderr
    after = sorted((str(file), file.stat().st_mtime_ns) for file in Path("r").rglob("*") if file.is_file())
    assert after == before
    assert not Path("new").exists()


def test_a_new_data_root_of_other_classes_is_refused(here: Path, call: Command) -> None:
    write_classes(Path("other"), [f"c{name}" for name in TWELVE])
    for said in (
        call("train", *LEARN, "data.root=other", "run_dir=r"),
        call("eval", "checkpoint=r", "data=imagefolder", "data.root=other"),
        call("analyze", "checkpoint=r", "accuracy=true", "data=imagefolder", "data.root=other"),
    ):
        assert said.returncode == 4
        assert (
            "unknown to the model: c0, c1, c10 (nearest: 10), c11 (nearest: 11), c2, ... 7 more"
            in said.stderr
        )
        assert "missing: 0, 1, 10, 11, 2, ... 7 more" in said.stderr


def test_a_map_names_the_class_of_a_folder(here: Path, call: Command) -> None:
    rename(("0", "zero"), ("11", "eleven"))
    Path("map.txt").write_text("zero: 0\neleven: 11\n")
    on = call("train", *LEARN, "data.root=d12", "run_dir=r", "trainer.epochs=7", "class_map=map.txt")
    assert not on.returncode, on.stderr
    result = json.loads(Path("r/result.json").read_text())
    assert (result["val/top1"], result["val/loss"] < 0.5) == (1.0, True)
    # The map belongs to the run's data, as its folder does.
    report = result_of(call("eval", "checkpoint=r/checkpoints/last", "threads=1"))
    assert report["top1"] == 1.0
    assert report["labels"]["class_map"] == f"{Path.cwd()}/map.txt"
    given = ["data=imagefolder", "data.root=d12", "data.class_map=map.txt"]
    assert result_of(call("eval", "checkpoint=r", *given, "threads=1"))["top1"] == 1.0
    assert call("data-check", "root=d12", "data.class_map=map.txt", "timing=false").returncode == 0
    Path("map.txt").write_text("zer0: 0\neleven: 11\n")
    wrong = call("eval", "checkpoint=r", *given)
    assert wrong.returncode == 4
    assert "has no folder zer0; did you mean 'zero'?" in wrong.stderr


def test_several_folders_may_be_one_class(here: Path, call: Command) -> None:
    shutil.copytree("d12/val/3", "d12/val/three")
    Path("map.txt").write_text("three: 3\n")
    report = result_of(
        call("eval", "checkpoint=r", "data=imagefolder", "data.root=d12", "class_map=map.txt", "threads=1")
    )
    assert (report["images"], report["top1"]) == (130, 1.0)


def test_names_may_be_given_in_the_place_of_those_of_the_file(here: Path, call: Command) -> None:
    words = [f"word {name}" for name in TWELVE]
    rename(*zip(TWELVE, words, strict=True))
    Path("names.txt").write_text("".join(f"word {name}\n" for name in sorted(TWELVE)))
    given = ["checkpoint=r", "data=imagefolder", "data.root=d12", "threads=1"]
    assert call("eval", *given).returncode == 4
    assert result_of(call("eval", *given, "classes=names.txt"))["top1"] == 1.0
    Path("names.txt").write_text("word 0\n")
    wrong = call("eval", *given, "classes=names.txt")
    assert (wrong.returncode, wrong.stderr) == (
        4,
        "error: classes=names.txt: holds 1 names, but the model has 12 outputs\n",
    )


def test_a_data_set_may_lack_classes_if_that_is_asked_for(here: Path, call: Command) -> None:
    for split in ("train", "val"):
        for name in TWELVE[4:]:
            shutil.rmtree(Path("d12", split, name))
    given = ["checkpoint=r", "data=imagefolder", "data.root=d12", "threads=1"]
    refused = call("eval", *given)
    assert refused.returncode == 4
    assert "missing: 10, 11, 4, 5, 6, ... 3 more" in refused.stderr
    assert "data.allow_subset=true" in refused.stderr
    done = call("eval", *given, "data.allow_subset=true")
    report = result_of(done)
    assert (report["top1"], report["images"], report["labels"]["restricted_to_present"]) == (1.0, 40, True)
    assert (report["labels"]["outputs"], report["labels"]["classes"]) == (12, 4)
    assert "outputs restricted to the 4 classes present, of 12" in done.stdout
    assert re.search(r"outputs +│ 4 of 12", done.stdout)
    (file,) = Path("r/checkpoints").glob("*.json")
    assert set(json.loads(file.read_text())["classes"]) == set(TWELVE[:4])
    # A class that the model does not know is refused all the same.
    Path("d12/val/3").rename("d12/val/three")
    assert "unknown to the model: three" in call("eval", *given, "data.allow_subset=true").stderr


def test_outputs_of_absent_classes_do_not_count(here: Path, call: Command) -> None:
    given = ["checkpoint=r", "data=imagefolder", "data.root=d12", "threads=1", "data.allow_subset=true"]
    whole = result_of(call("eval", *given))
    shutil.rmtree("d12/val/11")
    part = result_of(call("eval", *given))
    # An output fewer takes its share of the probability away, so the loss can only fall.
    assert 0 < part["loss"] < whole["loss"] + 0.1
    shutil.rmtree("d12/val")
    shutil.copytree("d12/train/11", "d12/val/11")
    alone = result_of(call("eval", *given))
    assert (alone["top1"], alone["loss"]) == (1.0, 0.0)


def test_validation_images_may_lack_classes(here: Path, call: Command) -> None:
    shutil.rmtree("d12/val/7")
    start = [*LEARN, "data.root=d12", "run_dir=new", "trainer.max_steps=2"]
    refused = call("train", *start)
    assert (refused.returncode, Path("new").exists()) == (4, False)
    assert "d12/val: other classes than those of train (missing: 7)" in refused.stderr
    check = ["data-check", "root=d12", "timing=false"]
    assert (call(*check).returncode, call(*check, "data.allow_subset=true").returncode) == (4, 0)
    done = call("train", *start, "data.allow_subset=true")
    assert not done.returncode, done.stderr
    assert "outputs restricted to the 11 classes present, of 12" in done.stdout
    assert json.loads(Path("new/result.json").read_text())["labels"]["restricted_to_present"] is True


def test_initial_weights_of_other_classes_get_a_fresh_head(here: Path, call: Command) -> None:
    rename(("0", "zero"))
    start = [*LEARN, "data.root=d12", "run_dir=w", "model.weights=r", "trainer.max_steps=1"]
    said = call("train", *start).stdout
    assert "fresh head: other classes than the file's (unknown to the model: zero; missing: 0)" in said


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders whose two usual orders differ, and a weights file of timm's names that was trained on them."""
    home = tmp_path_factory.mktemp("fruit")
    write_classes(home / "data", FRUIT, seed=1)
    learn = [*LEARN, "attn=self", "trainer.epochs=12", f"data.root={home}/data", f"run_dir={home}/own"]
    assert train.run(compose_command("train", learn))["val/top1"] == 1.0
    file = home / "own/checkpoints/last/model.safetensors"
    rows = [classes_of(file).index(name) for name in FRUIT]
    tensors = {
        name: value[rows].clone() if name.startswith("head.") else value
        for name, value in load_file(file).items()
    }
    torch.save({"state_dict": tensors}, home / "timm.pth")
    save_file(tensors, home / "timm.safetensors")
    return home


WARNING = "outputs are taken in timm's order of the folders (apple, Banana, cherry, Date)"


@pytest.mark.parametrize("file", [slowly("timm.pth"), "timm.safetensors"])
def test_a_file_of_timm_is_taken_in_its_order(fruit: Path, call: Command, file: str) -> None:
    given = [
        f"checkpoint={fruit}/{file}",
        "data=imagefolder",
        f"data.root={fruit}/data",
        "threads=1",
        *DIGITS,
    ]
    done = call("eval", *given)
    report = result_of(done)
    assert (report["top1"], report["labels"]["matched_by"]) == (1.0, "timm's order")
    told = " ".join(done.stdout.split())
    assert f"warning: {fruit}/{file} names no classes, so its {WARNING}" in told
    assert "classes=torchvision takes torchvision's order (Banana, Date, apple, cherry)" in told
    other = result_of(call("eval", *given, "classes=torchvision"))
    assert (other["top1"], other["labels"]["matched_by"]) == (0.0, "torchvision's order")
    names = Path("names.txt")
    names.write_text("\n".join(FRUIT))
    named = call("eval", *given, "classes=names.txt")
    assert (result_of(named)["top1"], "warning" in named.stdout) == (1.0, False)
    # Where the orders are one, nothing is said.
    shutil.copytree(fruit / "data", "lower")
    for split in ("train", "val"):
        for name in ("Banana", "Date"):
            Path("lower", split, name).rename(Path("lower", split, name.lower()))
    lower = call("eval", *given, "data.root=lower")
    assert (result_of(lower)["top1"], "warning" in lower.stdout) == (1.0, False)


def test_a_converted_file_keeps_what_was_known_of_its_classes(fruit: Path, call: Command) -> None:
    source = f"source={fruit}/timm.pth"
    given = ["data=imagefolder", f"data.root={fruit}/data", "threads=1"]
    said = call("convert", source, "out=c", *DIGITS).stdout
    assert "classes: not named; timm's order of a data set's folders is assumed" in said
    done = call("eval", "checkpoint=c", *given)
    assert result_of(done)["top1"] == 1.0
    assert "timm's order" in done.stdout
    Path("names.txt").write_text("\n".join(FRUIT))
    call("convert", source, "out=named", "classes=names.txt", *DIGITS)
    assert classes_of(Path("named/model.safetensors")) == FRUIT
    named = call("eval", "checkpoint=named", *given)
    assert (result_of(named)["top1"], "warning" in named.stdout) == (1.0, False)


def test_initial_weights_of_timm_are_taken_in_its_order(fruit: Path, call: Command) -> None:
    start = [*LEARN, "attn=self", f"data.root={fruit}/data", f"model.weights={fruit}/timm.pth"]
    said = call("train", *start, *STILL, "run_dir=a").stdout
    assert "rows of the head taken in timm's order of classes (apple, Banana, cherry, Date)" in said
    assert "classes=torchvision takes them as Banana, Date, apple, cherry" in said
    assert json.loads(Path("a/result.json").read_text())["val/top1"] == 1.0
    call("train", *start, *STILL, "run_dir=b", "classes=torchvision")
    assert json.loads(Path("b/result.json").read_text())["val/top1"] == 0.0


def test_a_model_of_imagenet_meets_some_of_its_classes(fruit: Path, call: Command) -> None:
    tensors = load_file(fruit / "timm.safetensors")
    known = dict(zip(("n01440764", "n02007558", "n15075141"), (0, 130, 999), strict=True))
    head = {
        name: torch.full((1000, *value.shape[1:]), -9.0) for name, value in tensors.items() if "head." in name
    }
    for place, row in enumerate(known.values()):
        for name in head:
            head[name][row] = tensors[name][place]
    save_file(tensors | head, "thousand.safetensors")
    for name, fruit_name in zip(known, FRUIT, strict=False):
        shutil.copytree(fruit / "data/val" / fruit_name, f"some/val/{name}")
    given = ["checkpoint=thousand.safetensors", "data=imagefolder", "data.root=some", "threads=1", *DIGITS]
    assert "data.allow_subset=true" in call("eval", *given).stderr
    report = result_of(call("eval", *given, "data.allow_subset=true"))
    assert report["top1"] == 1.0
    assert report["labels"] == {
        "matched_by": "ImageNet-1k's order",
        "outputs": 1000,
        "classes": 3,
        "restricted_to_present": True,
        "class_map": None,
    }


def test_a_resumed_run_names_images_that_came_and_went(here: Path, call: Command) -> None:
    on = [*LEARN, "data.root=d12", "run_dir=r"]
    assert "other images" not in call("train", *on, "trainer.epochs=7").stdout
    shutil.copy("d12/train/3/00.png", "d12/train/3/new.png")
    shutil.copy("d12/val/3/00.png", "d12/val/3/new.png")
    Path("d12/train/7/05.png").unlink()
    done = call("train", *on, "trainer.epochs=7").stdout
    assert "d12/train: other images than at the checkpoint, 360 then and 360 now: " in done
    assert "1 added (3/new.png), 1 removed (7/05.png)" in done
    assert "d12/val: other images than at the checkpoint, 120 then and 121 now: 1 added (3/new.png)" in done
    assert "finished already" in done
    # Another run that goes on from this one knows them too, as long as the run's list is there.
    assert (
        "1 removed (7/05.png)" in call("train", *on[:-1], "run_dir=n", "resume=r", "trainer.epochs=8").stdout
    )
    shutil.rmtree("r/images")
    lost = call("train", *on, "trainer.epochs=8").stdout
    assert "d12/train: other images than at the checkpoint, 360 then and 360 now\n" in lost
    assert "other images" not in call("train", *on, "trainer.epochs=9").stdout
