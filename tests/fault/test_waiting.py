"""Let an image take forever, and a data set go away: a stop saves at once, and no step is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepvit_train.cli import main
from deepvit_train.data import dataset, patience
from deepvit_train.data.decode import Limits, Picture
from tests.conftest import slowly
from tests.fault.test_kill import RUN as KILLED
from tests.fault.test_kill import finish, lines_logged, metrics, outcome
from tests.fault.test_signal import _alive as alive
from tests.fault.test_signal import wait_for

pytestmark = [pytest.mark.runs, pytest.mark.xdist_group("waiting")]

RUN = [*KILLED, "trainer.save_every_steps=1000", "trainer.eval_every_epochs=4"]
STEPS = 20

# Training images hang, in C, from a step on for as long as a file is there; patience is short.
PATIENT = """
import ctypes, sys
from pathlib import Path
from deepvit_train.cli import main
from deepvit_train.data import dataset, patience
patience.SAID_AFTER_S, patience.GIVEN_UP_AFTER_S = 1.0, float(sys.argv[2])
hang, parse = Path(sys.argv[1]), dataset.parse_picture

def slow(path, data, limits):
    while hang.exists() and "/train/" in path:
        ctypes.CDLL(None).usleep(100_000)
    return parse(path, data, limits)

dataset.parse_picture = slow
main(["train", *sys.argv[3:]])
"""


def launch(hang: Path, *arguments: str, given_up_after_s: float = 60) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PATIENT, str(hang), str(given_up_after_s), *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def saved_step(folder: Path) -> int:
    return json.loads((folder / "checkpoints" / "last" / "state.json").read_text())["step"]


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(*RUN, f"run_dir={folder}")
    assert lines_logged(folder) == STEPS
    return folder


@pytest.mark.parametrize("workers", [slowly(0), 2])
def test_a_stop_while_an_image_hangs_loses_no_step_and_the_file_was_named(
    whole: Path, tmp_path: Path, workers: int
) -> None:
    folder, hang = tmp_path / "run", tmp_path / "hang"
    run = [*RUN, f"run_dir={folder}", f"data.workers={workers}"]
    process = launch(hang, *run)
    wait_for(process, folder, 3)
    hang.touch()
    time.sleep(4)
    assert process.poll() is None
    asked, done = time.monotonic(), lines_logged(folder)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert "waiting for images since" in said
    assert "/train/" in said[said.index("waiting for images since") :]
    assert saved_step(folder) == lines_logged(folder) == done
    assert alive(process.pid) == []
    finish(*run)
    assert outcome(folder) == outcome(whole)
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize("workers", [slowly(0), 2])
def test_a_save_asked_for_while_an_image_hangs_is_made_and_the_run_goes_on(
    whole: Path, tmp_path: Path, workers: int
) -> None:
    folder, hang = tmp_path / "run", tmp_path / "hang"
    process = launch(hang, *RUN, f"run_dir={folder}", f"data.workers={workers}")
    wait_for(process, folder, 3)
    hang.touch()
    time.sleep(2)
    done = lines_logged(folder)
    process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while not (folder / "checkpoints" / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saved_step(folder) == done
    hang.unlink()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert outcome(folder) == outcome(whole)


def test_a_hung_loader_dies_with_a_killed_run(digits: Path, tmp_path: Path) -> None:
    folder, hang = tmp_path / "run", tmp_path / "hang"
    process = launch(hang, *RUN, f"run_dir={folder}", "data.workers=2")
    wait_for(process, folder, 2)
    hang.touch()
    time.sleep(2)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(process.pid) == []


@pytest.mark.parametrize(("workers", "back"), [slowly(0, True), (2, True), (0, False), slowly(2, False)])
def test_a_data_set_that_goes_away_costs_neither_an_image_nor_a_step(
    whole: Path, digits: Path, tmp_path: Path, workers: int, back: bool
) -> None:
    folder, root = tmp_path / "run", tmp_path / "digits"
    shutil.copytree(digits, root)
    run = [*RUN, f"run_dir={folder}", f"data.workers={workers}", "data=digits", f"data.root={root}"]
    process = launch(tmp_path / "no", *run, given_up_after_s=60 if back else 2)
    wait_for(process, folder, 3)
    root.rename(tmp_path / "away")
    time.sleep(4)
    if back:
        (tmp_path / "away").rename(root)
    said, errors = process.communicate(timeout=120)
    assert "bad image" not in said
    assert f"{root}/train is gone; waiting" in said
    if back:
        assert process.returncode == 0, errors
        assert f"{root}/train is back" in said
    else:
        assert process.returncode == 4, errors
        assert "was gone for 2 s" in errors
        assert "the same command goes on" in errors
        assert "Traceback" not in errors
        assert saved_step(folder) == lines_logged(folder) < STEPS
        (tmp_path / "away").rename(root)
        finish(*run)
    assert outcome(folder) == outcome(whole)
    assert metrics(folder) == metrics(whole)


def trained(overrides: list[str], hang: Path) -> int:
    """Start a run in a copy of this process, whose training images hang while a file is there."""
    process = os.fork()
    if process:
        return process
    patience.SAID_AFTER_S, patience.GIVEN_UP_AFTER_S = 0.5, 0.5
    parse = dataset.parse_picture

    def slow(path: str, data: bytes, limits: Limits) -> Picture:
        while hang.exists() and "/train/" in path:
            time.sleep(0.1)
        return parse(path, data, limits)

    dataset.parse_picture = slow
    try:
        main(["train", *overrides])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(70)


@pytest.mark.parametrize("harm", ["slow image", "vanished data root"])
@pytest.mark.parametrize("moments", [2, slowly(20)])
def test_harm_at_random_moments_costs_no_step(digits: Path, tmp_path: Path, harm: str, moments: int) -> None:
    rng, lost = random.Random(moments), []
    root, hang = tmp_path / "digits", tmp_path / "hang"
    shutil.copytree(digits, root)
    for moment in range(moments):
        folder, workers = tmp_path / f"run{moment}", moment % 3
        overrides = [*RUN, "trainer.epochs=400", f"run_dir={folder}", f"data.root={root}"]
        process = trained([*overrides, f"data.workers={workers}"], hang)
        seen = rng.randrange(1, 30)
        while lines_logged(folder) < seen:
            assert os.waitpid(process, os.WNOHANG)[0] == 0
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        if harm == "slow image":
            hang.touch()
            time.sleep(1)
            os.kill(process, signal.SIGTERM)
        else:
            root.rename(tmp_path / "away")
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code == (143 if harm == "slow image" else 4)
        hang.unlink(missing_ok=True)
        if (tmp_path / "away").exists():
            (tmp_path / "away").rename(root)
        lost.append(lines_logged(folder) - saved_step(folder))
    print(f"{harm}, {moments} moments: steps lost: {lost}")
    assert lost == [0] * moments
