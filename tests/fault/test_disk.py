"""Fill, limit, lock and corrupt a disk: the fault is named, and the last good checkpoint stays."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepvit_train.commands import train
from deepvit_train.config.compose import compose_command
from deepvit_train.error import OutputError
from deepvit_train.run.checkpoint import checkpoints_in, newest_valid, verify
from tests.conftest import QUICK, Command, forked


def start(folder: Path, *overrides: str) -> dict[str, object]:
    return train.run(compose_command("train", [*QUICK, f"run_dir={folder}", *overrides]))


@pytest.fixture(scope="module")
def trained(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert forked(lambda: start(folder, "trainer.save_every_steps=3", "trainer.keep_last=9")) == 0
    return folder


def test_a_save_that_does_not_fit_names_need_and_free_space(trained: Path, call: Command) -> None:
    run = Path("run")
    shutil.copytree(trained, run)
    before = {path.name for path in checkpoints_in(run / "checkpoints")}

    def limited() -> None:
        # Files may not grow past 20 kB: the first weights file of the next save does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        result = call("train", *QUICK, "run_dir=run", "trainer.save_every_steps=3", "trainer.epochs=3")
        Path("said").write_text(result.stderr)
        os._exit(result.returncode)

    code = forked(limited)
    assert code == 6, Path("said").read_text()
    said = Path("said").read_text()
    assert "can't be written" in said or "can't write the checkpoint" in said
    assert {path.name for path in checkpoints_in(run / "checkpoints")} >= before
    for path in checkpoints_in(run / "checkpoints"):
        verify(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    if mount.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on_when_there_is_room(
    digits: Path, small_disk: Path
) -> None:
    size = ["model.dim=64", "trainer.keep_last=99", "trainer.save_every_steps=1"]
    filled = f"{small_disk}.said"

    def fill() -> None:
        try:
            start(small_disk / "run", *size)
        except OutputError as error:
            Path(filled).write_text(str(error))
            os._exit(error.exit_code)

    assert forked(fill) == 6
    said = Path(filled).read_text()
    assert "it needs" in said
    assert "MiB are free" in said
    kept = checkpoints_in(small_disk / "run" / "checkpoints")
    assert kept
    assert newest_valid(small_disk / "run" / "checkpoints", print) == kept[-1]
    assert list((small_disk / "run" / "checkpoints").glob(".partial-*")) == []
    subprocess.run(["mount", "-o", "remount,size=400m", str(small_disk)], check=True)
    assert forked(lambda: start(small_disk / "run", *size)) == 0


@pytest.mark.runs
def test_batches_need_no_shared_memory_of_the_system(digits: Path, tmp_path: Path) -> None:
    """A container has 64 MB of it; here it is 1 MiB, less than a batch."""
    large = ["model.image_size=64", "model.patch_size=16", "trainer.batch_size=128", "data.workers=2"]
    train = [sys.executable, "-m", "deepvit_train.cli", "train", *QUICK, *large, f"run_dir={tmp_path}/run"]
    command = f"mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 99; exec {shlex.join(train)}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command], env=environment, capture_output=True, text=True
    )
    if done.returncode == 99 or "unshare:" in done.stderr:
        pytest.skip("may not mount a file system here")
    assert done.returncode == 0, done.stderr
    assert "done at step 12" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_refused_before_the_first_batch(
    digits: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="can't be written"):
        start(tmp_path / "run")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_every_cut_of_the_newest_checkpoint_is_caught_and_the_one_before_is_used(
    trained: Path, name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints", folder, symlinks=True)
    *_, before, newest = checkpoints_in(folder)
    whole = (newest / name).read_bytes()
    for length in (0, 1, 8, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        (newest / name).write_bytes(whole[:length])
        named: list[str] = []
        assert newest_valid(folder, named.append) == before
        assert len(named) == 1
        assert newest.name in named[0]
    (newest / name).write_bytes(whole)
    assert newest_valid(folder, print) == newest


def test_the_newest_is_by_step_whatever_the_clock_says(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints", folder, symlinks=True)
    first, *_, newest = checkpoints_in(folder)
    a_year = 365 * 86400
    os.utime(first, (first.stat().st_atime + a_year, first.stat().st_mtime + a_year))
    assert newest_valid(folder, print) == newest
