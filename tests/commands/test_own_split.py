"""A run's own split is evaluated where none is named, and its training images are never taken for others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deepvit_train.config.compose import compose_command
from deepvit_train.evaluation.loaded import load
from deepvit_train.run.found import find
from tests.conftest import QUICK, Command

SMALL = ["threads=1", "data.workers=0"]
PLAIN = [*QUICK, "data=imagefolder", "augment=none", "trainer.batch_size=8"]


@pytest.fixture
def run(call: Command, image_folder: Path) -> Path:
    """A run that evaluated `validation`, beside which lies no `val`."""
    (image_folder / "val").rename(image_folder / "validation")
    given = [f"data.root={image_folder}", "data.split=validation", "run_dir=run"]
    done = call("train", *PLAIN, *given)
    assert done.returncode == 0, done.stderr
    return Path("run").resolve()


def last_line(output: str) -> dict[str, object]:
    return json.loads(output.splitlines()[-1])


@pytest.mark.runs
def test_every_command_takes_the_split_that_the_run_evaluated(
    run: Path, call: Command, image_folder: Path
) -> None:
    done = call("eval", "run", *SMALL)
    assert done.returncode == 0, done.stderr
    report = last_line(done.stdout)
    assert (report["split"], report["images"]) == ("validation", 9)
    assert "validation: 9 images" in done.stdout
    assert "warning: all" not in done.stdout
    for checkpoint in ("best", "last"):
        kept = json.loads((run / "checkpoints" / checkpoint / "state.json").read_text())["data_keys"]
        assert kept["split"] == "validation"

    done = call("predict", "run", *SMALL, "out=p.csv")
    assert (done.returncode, last_line(done.stdout)["images"]) == (0, 9)
    done = call("analyze", "run", *SMALL, "accuracy=true", "report=false", "collapse.images=2")
    assert done.returncode == 0, done.stderr
    analysis = json.loads((run / "analysis" / "analysis.json").read_text())
    assert analysis["data"]["split"] == "validation"
    assert analysis["models"][0]["accuracy"]["calibrated"]["images"] == 9
    done = call("eval", "run", *SMALL, "suite=corruptions", "suite.corruptions=[contrast]")
    assert done.returncode == 0, done.stderr

    # Its evaluation is found, and what is typed wins.
    shutil.copytree(run, "other", symlinks=True)
    done = call("compare", "run", "other", "threads=1")
    assert done.returncode == 0, done.stderr
    assert "not evaluated yet" not in done.stdout
    shutil.copytree(image_folder / "validation", image_folder / "val")
    shutil.rmtree(image_folder / "val" / "cat")
    done = call("eval", "run", *SMALL, "data.split=val", "data.allow_subset=true", "report=false")
    assert (last_line(done.stdout)["split"], last_line(done.stdout)["images"]) == ("val", 6)


@pytest.mark.runs
def test_a_run_is_never_told_to_evaluate_its_training_images(
    run: Path, call: Command, image_folder: Path
) -> None:
    # No command but train says how to split train.
    missing = call("eval", "run", *SMALL, "data.split=tests")
    assert missing.returncode == 4
    assert "data.split=validation evaluates on that" in missing.stderr
    assert "val_share" not in missing.stderr

    # A folder that holds the training images, or that they lie in, is not split again.
    for root in (image_folder / "train", image_folder / "train" / "ant", image_folder.parent, image_folder):
        refused = call("eval", "run", *SMALL, f"data.root={root}", "data.val_share=0.1")
        assert refused.returncode == 2, root
        assert "among those of val" in refused.stderr
    shutil.copytree(image_folder / "validation", image_folder / "new" / "all")
    shutil.copytree(image_folder / "validation", "flat")
    done = call("eval", "run", *SMALL, "data.root=flat", "data.val_share=0.5", "report=false")
    assert done.returncode == 0, done.stderr
    assert "warning: " not in done.stdout

    # By whatever path they are reached, training images are counted.
    done = call("eval", "run", *SMALL, "data.split=train", "report=false")
    assert f"warning: all 24 images of {image_folder}/train are among those that {run} was" in done.stdout
    mixed = Path("mixed/val")
    shutil.copytree(image_folder / "validation", mixed)
    for number in range(2):
        (mixed / "bee" / f"t{number}.png").symlink_to(image_folder / "train" / "bee" / f"{number}.png")
    given = [*SMALL, "data.root=mixed", "data.split=val", "data.follow_links=true", "report=false"]
    assert "warning: 2 of 11 images of mixed/val are among those" in call("eval", "run", *given).stdout
    shutil.rmtree(mixed / "cat")
    (mixed / "cat").symlink_to(image_folder / "train" / "cat")
    assert "warning: 10 of 16 images of mixed/val are among those" in call("eval", "run", *given).stdout


@pytest.mark.runs
def test_an_older_checkpoint_has_the_split_of_its_runs_configuration(run: Path) -> None:
    def split_of() -> str:
        return load(str(run), "auto").data_for(compose_command("eval", [str(run)]).data).evaluated

    found = find(str(run))
    assert (found.split(), split_of()) == ("validation", "validation")
    earlier = {key: value for key, value in found.data_keys().items() if key != "split"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(found), "data_keys", lambda self: earlier)
        assert split_of() == "validation"
        (run / "config.yaml").unlink()
        assert split_of() == "val"


def test_a_run_of_version_0_1_has_its_split() -> None:
    assert find(str(Path(__file__).parents[1] / "fixtures" / "run_of_0_1")).split() == "val"
