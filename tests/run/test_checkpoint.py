"""Write and read checkpoints: each is whole or not there, and every damage is noticed."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from deepvit_train.error import CheckpointError, OutputError
from deepvit_train.run import checkpoint, saving
from deepvit_train.run.description import read_description
from deepvit_train.run.found import Found, find
from tests.conftest import forked

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}


def write(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: saving.TensorFile(TENSORS, {"about": name}) for name in ("model", "ema")}
    return saving.write_checkpoint(folder, step, files, {"note": "x"})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = write(tmp_path, 12)
    checkpoint.verify(written)
    assert written.name == "step_0000012"
    read = checkpoint.read_tensors(written / "model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in TENSORS.items())
    with safe_open(written / "ema.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"about": "ema"}
    assert checkpoint.read_state(written) == {"format": 1, "step": 12, "note": "x"}


def test_nothing_is_pickled(tmp_path: Path) -> None:
    assert {file.suffix for file in write(tmp_path, 1).iterdir()} == {".safetensors", ".json"}


def test_a_kill_while_a_checkpoint_of_the_same_step_is_replaced_leaves_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, rename = write(tmp_path, 12), Path.rename

    def die(path: Path, target: Path) -> None:
        if path.name.startswith(saving.TEMPORARY):
            raise KeyboardInterrupt
        rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 12)
    left = checkpoint.newest_valid(tmp_path, pytest.fail)
    assert left is not None
    assert left != written
    assert checkpoint.read_state(left)["step"] == 12
    assert checkpoint.newest_valid(tmp_path, pytest.fail) == left
    assert write(tmp_path, 12) == written
    assert checkpoint.newest_valid(tmp_path, pytest.fail) == written
    saving.prune(tmp_path, 1, written, keep=set())
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path: Path) -> None:
    written = write(tmp_path, 1)
    rng = random.Random(0)
    for file in sorted(written.iterdir()):
        whole = file.read_bytes()
        for _ in range(50):
            place = rng.randrange(len(whole))
            file.write_bytes(
                whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
            )
            with pytest.raises(CheckpointError, match="step_0000001"):
                checkpoint.verify(written)
        for length in (0, 1, 8, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(CheckpointError):
                checkpoint.verify(written)
        file.unlink()
        with pytest.raises(CheckpointError):
            checkpoint.verify(written)
        file.write_bytes(whole)
    checkpoint.verify(written)


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "sub/state.json"])
def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    written = write(tmp_path, 1)
    manifest = json.loads((written / checkpoint.MANIFEST).read_text())
    manifest["sha256"][name] = "0"
    (written / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(CheckpointError, match="not a file of the checkpoint"):
        checkpoint.verify(written)


def test_the_newest_whole_one_is_used_and_the_damaged_one_named(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 9), write(tmp_path, 10)
    (newer / "model.safetensors").write_bytes(b"")
    named: list[str] = []
    assert checkpoint.newest_valid(tmp_path, named.append) == older
    assert "step_0000010" in named[0]


def test_pruning_keeps_the_newest_the_named_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    (tmp_path / f"{saving.TEMPORARY}step_0000011").mkdir()
    written = tmp_path / "step_0000010"
    saving.prune(tmp_path, keep_last=2, written=written, keep={"step_0000001"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000001",
        "step_0000003",
        "step_0000010",
    ]


def test_pruning_never_takes_what_was_just_written(tmp_path: Path) -> None:
    for step in (50, 60, 100):  # resumed from 50, as 100 was damaged
        write(tmp_path, step)
    saving.prune(tmp_path, keep_last=1, written=tmp_path / "step_0000060", keep=set())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000060", "step_0000100"]


def test_a_run_stands_for_its_best_checkpoint_else_its_newest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, second = write(folder, 1), write(folder, 2)
    assert find(str(tmp_path)).folder == second
    saving.point(folder, "best", first)
    assert find(str(tmp_path)).folder == first
    assert find(str(folder)).folder == first
    assert find(str(tmp_path), prefer="last").folder == second
    assert find(str(second)).folder == second
    saving.point(folder, "best", second)
    assert find(str(folder / "best")).folder == folder / "best"
    assert find(str(tmp_path)).folder == second


def test_all_that_a_path_leads_to_is_found_at_once(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = write(run / "checkpoints", 3)
    saving.point(folder.parent, "last", folder)
    ema, live = folder / "ema.safetensors", folder / "model.safetensors"
    assert find(str(run)) == Found(ema, folder, run, "ema")
    assert find(str(folder), "live") == Found(live, folder, run, "live")
    assert find(str(live)) == Found(live, folder, run, "live")
    linked = find(str(folder.parent / "last"))
    assert (linked.run, linked.beside("ema.val.json")) == (run, folder.parent / "step_0000003.ema.val.json")


def test_a_checkpoint_outside_of_a_run_and_a_file_outside_of_a_checkpoint(tmp_path: Path) -> None:
    alone = write(tmp_path, 3).rename(tmp_path / "alone")
    assert find(str(alone)) == Found(alone / "ema.safetensors", alone, None, "ema")
    (tmp_path / "converted").mkdir()
    file = (alone / "model.safetensors").rename(tmp_path / "converted" / "model.safetensors")
    for path in (file.parent, file):
        found = find(str(path))
        assert found == Found(file, None, None, "live")
        assert found.calibrated() is None
        assert found.data_path("data_root") is None
        assert found.beside("live.val.json") == file.parent / "model.safetensors.live.val.json"


def test_weights_that_a_checkpoint_has_not_are_refused(tmp_path: Path) -> None:
    files = {"model": saving.TensorFile(TENSORS)}
    written = saving.write_checkpoint(tmp_path, 1, files, {})
    assert find(str(written)).kind == "live"
    with pytest.raises(CheckpointError, match="holds no ema weights; nearest: weights=auto"):
        find(str(written), "ema")


def test_a_missing_checkpoint_is_named_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "good" / "checkpoints", 1)
    with pytest.raises(CheckpointError, match=r"did you mean 'good'\?"):
        find(str(tmp_path / "god"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find(str(tmp_path / "empty"))


def refuse(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_the_outcome_is_added_and_no_tensor_is_written_again(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    writer = saving.CheckpointWriter(tmp_path, keep_last=2)
    files = {name: saving.TensorFile(TENSORS) for name in ("model", "ema")}
    writer.save(7, files, {"note": "due"}, best=False)
    writer.wait()
    target = tmp_path / "step_0000007"
    model = target / "model.safetensors"
    inode = model.stat().st_ino
    assert not (tmp_path / "best").exists()
    statistic = "blocks.0.attn.norm.running_mean"
    added = {"calibrated": saving.TensorFile({f"live.{statistic}": torch.ones(2)})}
    writer.complete(7, added, {"note": "done"}, best=True)
    writer.wait()
    writer.close()
    checkpoint.verify(target)
    assert checkpoint.read_state(target)["note"] == "done"
    assert checkpoint.read_calibrated(target)["live"][statistic].tolist() == [1, 1]
    assert set(checkpoint.read_tensors(model)) == set(TENSORS)
    assert (model.stat().st_ino == inode) == links
    assert model.stat().st_nlink == 1
    assert {entry.name for entry in tmp_path.iterdir()} == {"step_0000007", "last", "best"}
    assert (tmp_path / "best").resolve() == (tmp_path / "last").resolve() == target


def test_an_outcome_that_can_not_be_added_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = write(tmp_path, 7)
    monkeypatch.setattr(saving, "_write_json", refuse)
    with pytest.raises(OutputError, match="No space left"):
        saving.write_checkpoint(tmp_path, 7, {}, {"note": "done"}, completes=True)
    checkpoint.verify(written)
    assert checkpoint.read_state(written)["note"] == "x"
    assert list(tmp_path.iterdir()) == [written]


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = write(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OutputError, match=r"No space left.*it needs .* MiB, .* MiB are free"):
        write(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [older]
    checkpoint.verify(older)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\xff" * 8 + b"{}", b"x" * 64])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    for read in (checkpoint.read_tensors, read_description):
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read(file)


def test_a_folder_in_the_place_of_a_link_is_kept(tmp_path: Path) -> None:
    """`cp -rL` of a run makes folders of its links."""
    target = tmp_path / "step_0000002"
    for folder in (target, tmp_path / "last"):
        folder.mkdir()
    (tmp_path / "last" / "state.json").write_text("{}")
    for _ in range(2):
        saving.point(tmp_path, "last", target)
        assert (tmp_path / "last").resolve() == target.resolve()
    assert (tmp_path / "last-copied" / "state.json").read_text() == "{}"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_all_files_of_a_checkpoint_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        written = write(tmp_path, 1)
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in written.iterdir()} == {oct(0o666 & ~umask)}
    assert stat.S_IMODE(written.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("name", ["model.safetensors", "manifest.json", "state.json", "", ".."])
def test_what_may_not_be_read_is_not_called_damaged_and_no_older_one_takes_its_place(
    tmp_path: Path, name: str
) -> None:
    """As another user, since root may read everything."""
    tmp_path.chmod(0o755)
    for step in (1, 2):
        write(tmp_path / "checkpoints", step)
    closed = tmp_path / "checkpoints" / "step_0000002" / name

    def as_a_stranger() -> None:
        for parent in tmp_path.parents[:2]:  # pytest's folders are for their owner alone
            parent.chmod(0o755)
        closed.chmod(0)
        os.seteuid(65534)
        for look in (
            lambda: checkpoint.newest_valid(tmp_path / "checkpoints", pytest.fail),
            lambda: find(str(tmp_path)),
        ):
            with pytest.raises(checkpoint.UnreadableError, match="Permission denied") as error:
                look()
            assert "damaged" not in str(error.value)

    if os.geteuid():
        pytest.skip("needs root, to become another user")
    assert forked(as_a_stranger) == 0


@pytest.mark.parametrize("path", ["nofile", "~nobody-of-that-name/x", "a" * 300])
def test_the_key_that_was_given_is_named(tmp_path: Path, path: str) -> None:
    for key in ("checkpoint", "resume", "model.weights", "source"):
        with pytest.raises(CheckpointError) as error:
            find(path, key=key)
        assert str(error.value).startswith(f"{key}={path}: ")


def test_a_name_that_differs_in_its_unicode_form_only_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "cafe\u0301").mkdir()
    with pytest.raises(CheckpointError) as error:
        find(f"{tmp_path}/caf\u00e9")
    assert r"did you mean 'cafe\u0301'? It differs from 'caf\xe9' in its Unicode form only" in str(
        error.value
    )


@pytest.mark.parametrize("allowed", [0, 1, 2, 3])
def test_a_save_stops_where_the_folder_became_another_runs(tmp_path: Path, allowed: int) -> None:
    """Another run's checkpoint of the same step, and its older ones, stay as they are."""
    theirs = {step: saving.write_checkpoint(tmp_path, step, {}, {"note": "theirs"}) for step in (1, 2)}
    saving.point(tmp_path, "last", theirs[2])
    calls = []

    def check() -> None:
        calls.append(None)
        if len(calls) > allowed:
            raise OutputError("another run's")

    writer = saving.CheckpointWriter(tmp_path, keep_last=1, check=check)
    writer.save(3 if allowed > 1 else 2, {}, {"note": "ours"}, best=False)
    with pytest.raises(OutputError, match="another run's"):
        writer.wait()
    writer.close()
    assert len(calls) == allowed + 1
    assert not list(tmp_path.glob(f"{saving.TEMPORARY}*"))
    assert [json.loads((path / "state.json").read_text())["note"] for path in theirs.values()] == [
        "theirs"
    ] * 2
    assert (tmp_path / "last").resolve().name == ("step_0000003" if allowed > 2 else "step_0000002")
