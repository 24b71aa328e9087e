"""data.classes chooses and orders classes, and data.empty_classes lets one have no image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deepvit_train.config.compose import compose_command
from deepvit_train.data.index import ImageIndex, open_split
from deepvit_train.error import DataError
from tests.conftest import QUICK, Command


def opened(root: Path, *more: str, split: str = "train") -> ImageIndex:
    given = ["data=imagefolder", f"data.root={root}", "model=digits", *more]
    return open_split(compose_command("train", given).data, split)


def counts(index: ImageIndex) -> dict[str, int]:
    """The images of each class, by the folders that their paths lead to."""
    folders = [Path(index.path(image)).parent.name for image in range(len(index))]
    assert all(index.classes[target] == folder for target, folder in zip(index.targets, folders, strict=True))
    return {name: folders.count(name) for name in index.classes}


def test_classes_are_chosen_and_ordered(image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "0.png").unlink()
    assert counts(opened(image_folder, "data.classes=[cat, ant]")) == {"cat": 7, "ant": 8}
    assert list(counts(opened(image_folder, "data.classes=[cat,ant]", split="val"))) == ["cat", "ant"]
    (image_folder / "names.txt").write_text("cat\nant\n")
    chosen = opened(image_folder, f"data.classes={image_folder}/names.txt")
    assert counts(chosen) == {"cat": 7, "ant": 8}
    assert (
        chosen.digest == opened(image_folder, "data.classes=[cat,ant]").digest != opened(image_folder).digest
    )


def test_a_name_may_hold_a_comma_and_a_map_comes_first(image_folder: Path) -> None:
    (image_folder / "map.txt").write_text("ant: insect, six legs\nbee: insect, six legs\n")
    chosen = opened(
        image_folder, f"data.class_map={image_folder}/map.txt", 'data.classes=[cat, "insect, six legs"]'
    )
    assert chosen.classes == ["cat", "insect, six legs"]
    assert len(chosen) == 24


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("[ant, be]", r"train has no class be; did you mean 'bee'\?"),
        ("[ant, bee, ant]", "names 'ant' twice"),
        ("[]", "names no class"),
        ("[ant,]", "names no class"),
        ("no.txt", "can't be read"),
    ],
)
def test_other_names_are_refused(image_folder: Path, typed: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        opened(image_folder, f"data.classes={typed}")


def test_a_data_set_may_lack_chosen_classes(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "val" / "bee")
    chosen = ["data.classes=[bee,ant]"]
    with pytest.raises(DataError, match="val has no class bee"):
        opened(image_folder, *chosen, split="val")
    assert opened(image_folder, *chosen, "data.allow_subset=true", split="val").classes == ["ant"]
    assert counts(opened(image_folder, *chosen, "data.empty_classes=true", split="val")) == {
        "bee": 0,
        "ant": 3,
    }


def test_a_class_may_be_empty_if_that_is_asked_for(image_folder: Path) -> None:
    (image_folder / "train" / "dog").mkdir()
    for _ in range(2):  # the second time from the cache
        with pytest.raises(DataError, match=r"no image in class dog .*\ndata.empty_classes=true"):
            opened(image_folder)
        assert counts(opened(image_folder, "data.empty_classes=true"))["dog"] == 0
    assert list(counts(opened(image_folder, "data.classes=[ant,bee]"))) == ["ant", "bee"]
    empty = image_folder / "val"
    for file in empty.rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="no image in class ant, bee, cat"):
        opened(image_folder, "data.empty_classes=true", split="val")


@pytest.mark.runs
def test_a_run_takes_its_classes_along(image_folder: Path, call: Command) -> None:
    (image_folder / "train" / "dog").mkdir()
    given = ["data=imagefolder", f"data.root={image_folder}", "data.classes=[cat,dog,ant]"]
    learn = [*QUICK, *given, "data.empty_classes=true", "trainer.batch_size=4", "run_dir=r"]
    assert call("train", *learn).returncode == 0
    evaluated = call("eval", "r", "threads=1")
    report = json.loads(evaluated.stdout.splitlines()[-1])
    assert (report["images"], report["labels"]["outputs"]) == (6, 3)
    assert "classes without an image: 1" in evaluated.stdout
    (file,) = Path("r/checkpoints").glob("*.json")
    assert list(json.loads(file.read_text())["classes"]) == ["cat", "dog", "ant"]
    # In another order they are matched by name, and another choice is another model's.
    assert call("train", *learn, "data.classes=[ant,cat,dog]", "trainer.epochs=3").returncode == 0
    other = call("train", *learn, "data.classes=[ant,cat]", "trainer.epochs=4")
    assert (other.returncode, "missing: dog" in other.stderr) == (4, True)
    checked = call("data-check", str(image_folder), *given[2:], "data.empty_classes=true", "timing=false")
    assert json.loads(checked.stdout.splitlines()[-1])["splits"]["train"]["classes"] == 3
