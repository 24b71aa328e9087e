"""An evaluation that fails or is killed costs no step of training, and the next start begins with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deepvit_train.commands import train, train_resume
from deepvit_train.config.compose import compose_command
from deepvit_train.error import DataError
from deepvit_train.run.checkpoint import checkpoints_in, newest_valid
from deepvit_train.training import loop, validation
from tests.conftest import QUICK, Command, forked
from tests.fault.test_kill import dying, metrics, outcome

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("evaluation")]  # one run serves all

RUN = [*QUICK, "trainer.ema_decay=0.9", "model.dropout=0.1", "trainer.log_every_steps=1"]


def state_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "checkpoints" / "last" / "state.json").read_text())


def links(folder: Path) -> list[str]:
    return [(folder / "checkpoints" / name).resolve().name for name in ("last", "best")]


def same(folder: Path, whole: Path) -> None:
    """Check that a run left what the run left that was never stopped."""
    assert outcome(folder) == outcome(whole)
    assert metrics(folder) == metrics(whole)
    left, right = state_of(folder), state_of(whole)
    own = {"data_root": None, "identity": None}  # which run it is, and where its images are
    assert left | own == right | own
    assert links(folder) == links(whole)
    names = [[path.name for path in checkpoints_in(each / "checkpoints")] for each in (folder, whole)]
    assert names[0] == names[1]


def start(folder: Path, *overrides: str) -> dict[str, object]:
    return train.run(compose_command("train", [*RUN, f"run_dir={folder}", *overrides]))


def failing(error: Exception) -> Callable[..., object]:
    def fail(*_: object, **__: object) -> object:
        raise error

    return fail


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never stopped. It evaluates after steps 6 and 12."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert forked(lambda: start(folder)) == 0
    return folder


def test_an_unreadable_validation_image_costs_no_step(
    call: Command, digits: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits, tmp_path / "images")
    broken = next((tmp_path / "images" / "val" / "3").iterdir())
    good = broken.read_bytes()
    broken.write_bytes(good[:40])
    typed = [*RUN, "run_dir=run", "data=digits", f"data.root={tmp_path / 'images'}"]
    for start in range(2):  # the second loses nothing either
        result = call("train", *typed)
        assert result.returncode == 4
        first, second = result.stderr.strip().splitlines()
        assert first.startswith(f"error: evaluation of step 6: {broken}: ")
        assert "step_0000006; the same command begins with this evaluation" in second
        assert ("step 6/12" in result.stdout) == (start == 0)
        state = state_of(tmp_path / "run")
        assert (state["step"], state["evaluated_step"], state["metrics"]) == (6, -1, {})
        assert not (tmp_path / "run" / "checkpoints" / "best").exists()
    broken.write_bytes(good)
    result = call("train", *typed)
    assert result.returncode == 0, result.stderr
    assert "at step 6 of 12" in result.stdout
    assert "step 6/12" not in result.stdout
    same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate"), OSError(12, "Cannot")]
)
def test_an_evaluation_without_memory_names_the_key_that_helps(
    call: Command, whole: Path, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(validation, "evaluate", failing(error))
        result = call("train", *RUN, "run_dir=run")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 2
    assert "evaluation of step 6: out of memory" in result.stderr
    assert "trainer.eval_batch_size" in result.stderr
    assert "trainer.accumulate" not in result.stderr
    result = call("train", *RUN, "run_dir=run", "trainer.eval_batch_size=64")
    assert result.returncode == 0, result.stderr
    assert "trainer.eval_batch_size=256 (now 64): training does not change" in result.stdout
    left, right = outcome(tmp_path / "run"), outcome(whole)
    assert [left.pop("calibrated") is not None, right.pop("calibrated") is not None] == [True, True]
    assert left == right


def test_training_without_memory_names_the_keys_that_help_there(
    call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "train_step", failing(MemoryError()))
    result = call("train", *RUN, "run_dir=run")
    assert result.returncode == 1
    assert "trainer.accumulate" in result.stderr
    assert "trainer.eval_batch_size" not in result.stderr


def test_a_look_at_attention_maps_without_memory_costs_no_training(
    call: Command, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepvit_train.collapse.probe import Probe

    monkeypatch.setattr(Probe, "look", failing(MemoryError()))
    result = call("train", *RUN, "run_dir=run", "trainer.probe_every_steps=4")
    assert result.returncode == 0, result.stderr
    said = "step 4: warning: out of memory, so attention maps were not looked at; try a lower collapse.images"
    assert said in result.stdout
    assert result.stdout.count("attention maps were not looked at") == 4  # steps 0, 4, 8, 12
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("evaluation", [1, 2, 3, 4])
def test_a_kill_in_an_evaluation_costs_no_step(
    whole: Path, evaluation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each evaluation measures live and averaged weights: 1 and 2 after step 6, 3 and 4 after step 12."""
    folder, evaluate, done = tmp_path / "run", validation.evaluate, 0

    def killed(*arguments: object) -> object:
        nonlocal done
        done += 1
        if done == evaluation:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(*arguments)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patched:
        patched.setattr(validation, "evaluate", killed)
        assert forked(lambda: start(folder)) == -signal.SIGKILL
    if evaluation < 3:  # later ones begin while the checkpoint is still being written
        assert (state_of(folder)["step"], state_of(folder)["evaluated_step"]) == (6, -1)
    assert forked(lambda: start(folder)) == 0
    same(folder, whole)


@pytest.mark.parametrize("when", ["logged", "said"])
def test_a_kill_after_the_metrics_are_logged_logs_them_once(
    whole: Path, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        if when == "logged":
            patched.setattr(loop, "phrase", killed)
        else:
            patched.setattr(loop.Saver, "complete", killed)
        assert forked(lambda: start(tmp_path / "run")) == -signal.SIGKILL
    assert any("val/top1" in line for line in metrics(tmp_path / "run"))
    assert forked(lambda: start(tmp_path / "run")) == 0
    same(tmp_path / "run", whole)


def check_a_kill(moment: int, folder: Path, whole: Path) -> int:
    """Be killed in place of one file operation, go on, and compare. Returns how the first start ended."""
    ended = forked(lambda: dying(moment, folder, [*RUN, f"run_dir={folder}"]))
    damaged: list[str] = []
    newest_valid(folder / "checkpoints", damaged.append)
    assert damaged == []
    assert forked(lambda: start(folder)) == 0
    same(folder, whole)
    assert list((folder / "checkpoints").glob(".partial-*")) == []
    return ended


# Around the first evaluation: before the save gets its name, before tensors are linked, before the manifest,
# before the save is set aside, before the outcome takes its place, while what was set aside is deleted, and
# at the links `last` and `best`.
@pytest.mark.parametrize("moment", [25, 36, 45, 49, 50, 53, 54, 57, 60, 62])
def test_kills_while_the_outcome_is_added(whole: Path, moment: int, tmp_path: Path) -> None:
    assert check_a_kill(moment, tmp_path / "run", whole) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 124))
def test_kills_at_every_operation_of_two_evaluations(whole: Path, moment: int, tmp_path: Path) -> None:
    check_a_kill(moment, tmp_path / "run", whole)


def test_an_evaluation_that_is_due_when_another_run_goes_on_from_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with monkeypatch.context() as patched:
        patched.setattr(validation, "evaluate", failing(DataError("x.png: broken")))
        with pytest.raises(DataError):
            start(first)
        with pytest.raises(DataError, match=r"saved .*second/checkpoints/step_0000006"):
            start(second, f"resume={first}")
    start(second, f"resume={first}")
    assert outcome(second) == outcome(whole)


def config_of(folder: Path) -> dict[str, dict[str, object]]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_failed_resume_leaves_the_configuration(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    start(folder, "trainer.max_steps=7")
    before = (folder / "config.yaml").read_bytes()
    longer = ["trainer.epochs=4", "trainer.max_steps=null", "trainer.accumulate=2"]
    for name, error in (("train_step", MemoryError()), ("learning_rate", DataError("x"))):
        with monkeypatch.context() as patched:
            patched.setattr(loop, name, failing(error))
            with pytest.raises(type(error)):
                start(folder, *longer)
        assert (folder / "config.yaml").read_bytes() == before
    damaged = folder / "checkpoints" / "step_0000007" / "optimizer.safetensors"
    content = damaged.read_bytes()
    monkeypatch.setattr(train_resume, "resume", failing(DataError("does not fit")))
    with pytest.raises(DataError, match="does not fit"):
        start(folder, *longer)
    monkeypatch.undo()
    assert (folder / "config.yaml").read_bytes() == before
    assert damaged.read_bytes() == content
    capsys.readouterr()
    start(folder)  # would be refused, had trainer.epochs=4 been stored
    assert outcome(folder) == outcome(whole)
    assert config_of(folder)["trainer"]["max_steps"] is None


def test_keys_that_change_no_result_or_its_rounding_may_change(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    start(folder, "trainer.max_steps=7")
    capsys.readouterr()
    changed = {
        "trainer.accumulate": ("1", "2"),
        "trainer.eval_batch_size": ("256", "100"),
        "trainer.calibrate_images": ("64", "32"),
        "trainer.eval_every_epochs": ("1", "2"),
        "data.max_pixels": ("100000000", "90000000"),
        "data.max_bytes": ("268435456", "1000000"),
    }
    start(folder, *(f"{key}={after}" for key, (_, after) in changed.items()))
    said = capsys.readouterr().out.splitlines()
    for key, (before, after) in changed.items():
        (line,) = [line for line in said if f"{key}=" in line]
        assert line.startswith(f"changed since the run began: {key}={before} (now {after})")
    (line,) = [line for line in said if "trainer.accumulate" in line]
    assert "sums round differently" in line
    assert state_of(folder)["step"] == 12
    assert config_of(folder)["trainer"]["accumulate"] == 2


def rates(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("the learning rate at step")]


def test_a_schedule_that_changes_on_the_way_says_both_rates(
    whole: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A longer trainer.epochs, then more images, then nothing new."""
    root, folder = tmp_path / "images", tmp_path / "run"
    for split in ("train", "val"):
        for label in ("0", "1"):
            shutil.copytree(digits / split / label, root / split / label)
    spare = sorted((root / "train" / "0").iterdir())[:40]
    for image in spare:
        image.rename(tmp_path / image.name)
    typed = ["data=digits", f"data.root={root}", "trainer.limit_batches=null", "trainer.epochs=4"]
    start(folder, *typed, "trainer.max_steps=8")
    logged = [line["train/lr"] for line in metrics(folder) if "train/lr" in line]
    capsys.readouterr()
    start(folder, *typed, "trainer.max_steps=9")
    assert rates(capsys.readouterr().out) == []

    start(folder, *typed[:3], "trainer.epochs=8", "trainer.max_steps=10")
    (line,) = rates(capsys.readouterr().out)
    old, new = (float(word) for word in line.split(": ")[0].split(" changes from ")[1].split(" to "))
    assert line.startswith("the learning rate at step 9 changes from ")
    assert line.endswith(": the schedule spans 8 epochs of 7 steps now")
    assert old < logged[-1]  # the cosine went down already
    assert new > old
    step_10 = [line for line in metrics(folder) if line["step"] == 10 and "train/lr" in line]
    assert step_10[0]["train/lr"] == pytest.approx(new, rel=1e-3)

    for image in spare:
        (tmp_path / image.name).rename(image)
    start(folder, *typed[:3], "trainer.epochs=8", "trainer.max_steps=11")
    (line,) = rates(capsys.readouterr().out)
    assert line.startswith("the learning rate at step 10 changes from ")
    start(folder, *typed[:3], "trainer.epochs=8", "trainer.max_steps=12")
    assert rates(capsys.readouterr().out) == []


def test_the_best_link_is_mended_after_a_kill(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    expected = links(folder)
    for name in ("last", "best"):
        (folder / "checkpoints" / name).unlink()
    (folder / "checkpoints" / "last").symlink_to("step_0000006")
    start(folder)  # which has finished already
    assert links(folder) == expected
