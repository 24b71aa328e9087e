"""Put what is of another run, step, folder or data set in a run's way: it is refused, and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepvit_train.run.checkpoint import as_json, digest_of
from tests.conftest import QUICK, Command
from tests.fault.conftest import RUN, STEPS, content
from tests.fault.test_kill import metrics, outcome

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("identity")]


def other_seed(run: Path) -> str:
    put(run.parent / "seed", run, "step_0000012")
    return "step_0000012: belongs to another run ('digits-reattention-d2-s1', "


def twin(run: Path) -> str:
    put(run.parent / "twin", run, "step_0000006")
    return "step_0000006: belongs to another run ('digits-reattention-d2-s0', "


def added(run: Path) -> str:
    shutil.rmtree(run / "checkpoints" / "step_0000012")
    return twin(run)


def put(source: Path, run: Path, name: str) -> None:
    """Put a checkpoint of one run in the place of another's."""
    shutil.rmtree(run / "checkpoints" / name)
    shutil.copytree(source / "checkpoints" / name, run / "checkpoints" / name)


def swapped(run: Path) -> str:
    first, last = (run / "checkpoints" / name for name in ("step_0000003", "step_0000012"))
    first.rename(run / "aside")
    last.rename(first)
    (run / "aside").rename(last)
    return "step_0000003: holds step 12, not step 3 as its name says"


def renamed(run: Path) -> str:
    (run / "checkpoints" / "step_0000012").rename(run / "checkpoints" / "step_0000020")
    return "step_0000020: holds step 12, not step 20 as its name says"


def without_number(run: Path) -> str:
    (run / "identity.json").unlink()
    return twin(run)


def other_number(run: Path) -> str:
    shutil.copy(run.parent / "twin" / "identity.json", run)
    return "step_0000003: belongs to another run ('digits-reattention-d2-s0', "


def damaged_number(run: Path) -> str:
    (run / "identity.json").write_text('{"format": 1, "run": ["x"]}')
    return "identity.json: does not name a run"


@pytest.mark.parametrize(
    "change", [other_seed, twin, added, swapped, renamed, without_number, other_number, damaged_number]
)
def test_a_checkpoint_that_is_not_what_its_place_says(change: object, runs: Path, call: Command) -> None:
    assert callable(change)
    named = change(runs / "a")
    before = content(runs / "a")
    done = call("train", *RUN, "run_dir=a", "trainer.epochs=3")
    assert done.returncode == 3, done.stdout
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert content(runs / "a") == before


def test_evaluation_and_analysis_refuse_it_too(runs: Path, call: Command) -> None:
    put(runs / "seed", runs / "a", "step_0000012")
    for command in ("eval", "analyze"):
        for checkpoint in ("a/checkpoints/step_0000012", "a/checkpoints/last"):
            done = call(command, f"checkpoint={checkpoint}")
            assert done.returncode == 3
            assert "belongs to another run" in done.stderr
    swapped(runs / "twin")
    done = call("eval", "checkpoint=twin/checkpoints/step_0000012")
    assert (done.returncode, "holds step 3, not step 12" in done.stderr) == (3, True)
    # Outside of a run a checkpoint may have any name.
    shutil.copytree(runs / "seed" / "checkpoints" / "step_0000012", runs / "mine")
    assert call("eval", "checkpoint=mine", "threads=1", "data.workers=0", "report=false").returncode == 0


def test_a_link_to_another_than_the_best_is_seen_and_mended(runs: Path, call: Command) -> None:
    link = runs / "a" / "checkpoints" / "best"
    best = str(link.readlink())
    link.unlink()
    link.symlink_to(next(name for name in STEPS if name != best))
    done = call("eval", "checkpoint=a")
    assert done.returncode == 3
    assert "which was not the best one when it was saved" in done.stderr
    assert call("train", *RUN, "run_dir=a").returncode == 0
    assert str(link.readlink()) == best
    assert call("eval", "checkpoint=a", "threads=1", "data.workers=0", "report=false").returncode == 0


def test_a_config_of_another_run_beside_the_checkpoints(runs: Path, call: Command) -> None:
    shutil.copy(runs / "seed" / "config.yaml", runs / "a")
    done = call("train", *RUN, "run_dir=a", "seed=1", "trainer.epochs=3")
    assert done.returncode == 3
    assert "step_0000003: was trained with seed=0, where config.yaml says 1" in done.stderr


def test_checkpoints_of_version_0_1_say_nothing_and_are_taken(runs: Path, call: Command) -> None:
    old = Path(__file__).parents[1] / "fixtures" / "run_of_0_1"
    shutil.copytree(old, runs / "old", symlinks=True)
    typed = [*QUICK, "attn=reattention", "trainer.epochs=5", "trainer.ema_decay=0.9", "run_dir=old"]
    done = call("train", *typed)
    assert done.returncode == 0, done.stderr
    state = json.loads((runs / "old" / "checkpoints" / "last" / "state.json").read_text())
    assert state["identity"]["run"] == json.loads((runs / "old" / "identity.json").read_text())["run"]
    done = call("train", *typed, "trainer.epochs=6")
    assert done.returncode == 0, done.stderr


# Another run's checkpoint.


def test_a_run_to_go_on_from_that_is_longer_than_the_plan(runs: Path, call: Command) -> None:
    for more in ([], ["trainer.max_steps=9"]):
        done = call("train", *RUN, "run_dir=b", "resume=a", *more)
        assert done.returncode == 2
        assert f"is at step 12 already, and this run ends at step {9 if more else 12}" in done.stderr
        assert ("trainer.epochs=3 trainer.max_steps=null" if more else "trainer.epochs=3") in done.stderr
        assert not (runs / "b").exists()
    assert call("train", *RUN, "run_dir=b", "resume=a", "trainer.epochs=3").returncode == 0


def test_the_best_of_another_run_is_not_this_run_s(runs: Path, call: Command) -> None:
    for state in (runs / "a" / "checkpoints").glob("step_*/state.json"):
        content = json.loads(state.read_text())
        content["best"] = {"step": 6, "val/top1": 1.0, "val_ema/top1": 1.0}
        resign(state, content)
    done = call("train", *RUN, "run_dir=b", "resume=a", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    assert str((runs / "b" / "checkpoints" / "best").readlink()) == "step_0000018"
    last = json.loads((runs / "b" / "checkpoints" / "last" / "state.json").read_text())
    assert last["best"]["step"] == 18


def resign(state: Path, content: dict[str, object]) -> None:
    """Write a state.json, with its digest in the manifest."""
    state.write_text(as_json(content))
    manifest = state.with_name("manifest.json")
    signed = json.loads(manifest.read_text())
    signed["sha256"]["state.json"] = digest_of(state)
    manifest.write_text(as_json(signed))


@pytest.mark.slow
def test_another_number_of_threads_is_said(runs: Path, command: Command) -> None:
    """In processes of their own: a fork of one that has used two threads of OpenMP may wait for ever."""
    done = command("train", *RUN, "run_dir=a", "trainer.epochs=3", "trainer.threads=2")
    assert "since step 12: threads=1 (now 2): results round differently" in done.stdout.splitlines()
    done = command("train", *RUN, "run_dir=a", "trainer.epochs=4", "trainer.threads=2")
    assert "round differently" not in done.stdout


# Another data set.


def pictures(root: Path, prefix: str, seed: int) -> Path:
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
            for number in range(32):
                pixels = random.integers(0, 256, (8, 8 + number % 3 + seed, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{prefix}{number}.png")
    return root


def test_a_run_goes_on_with_its_own_images_only(call: Command, tmp_path: Path) -> None:
    typed = [*RUN, "data=imagefolder", "model=digits", *QUICK[:3], "augment=digits", "trainer.batch_size=8"]
    same, moved, other, alike = (tmp_path / name for name in ("x", "moved", "other", "alike"))
    pictures(same / "images", "a", 0)
    pictures(moved / "images", "a", 0)
    pictures(other / "images", "b", 1)  # of the same classes
    pictures(alike / "images", "a", 5)  # of the same classes and paths
    first = call("train", *typed, "data.root=x/images")
    assert first.returncode == 0, first.stderr
    run = "runs/imagefolder-images-reattention-d2-s0"
    assert first.stdout.splitlines()[0] == f"run folder: {run}"
    before = content(Path(run))
    for root in (other, alike):
        done = call("train", *typed, f"data.root={root}/images", "trainer.epochs=3")
        assert done.returncode == 4
        lines = done.stderr.splitlines()
        assert lines[0].startswith(
            f"error: {root}/images/train: none of the 64 images that {run} was trained on"
        )
        assert (
            lines[1]
            == f"name=NEW begins a run of its own; with resume={run} too, it goes on from that run's weights"
        )
        assert content(Path(run)) == before
    # The two ways on that it names.
    assert call("train", *typed, "data.root=other/images", "name=new").returncode == 0
    goes_on = [*typed, "data.root=other/images", "name=next", f"resume={run}", "trainer.epochs=3"]
    assert call("train", *goes_on).returncode == 0
    # The same images elsewhere, and images that were added.
    done = call("train", *typed, "data.root=moved/images", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    Image.new("RGB", (8, 8)).save(moved / "images" / "train" / "ant" / "new.png")
    done = call("train", *typed, "data.root=moved/images", "trainer.epochs=4")
    assert done.returncode == 0, done.stderr
    assert "1 added (ant/new.png)" in done.stdout


def test_a_run_ends_with_the_bits_that_it_had_before(runs: Path, call: Command) -> None:
    """What a checkpoint says of its run changes nothing of its training."""
    assert outcome(runs / "a") == outcome(runs / "twin")
    assert metrics(runs / "a") == metrics(runs / "twin")
    assert (runs / "a" / "identity.json").read_text() != (runs / "twin" / "identity.json").read_text()
