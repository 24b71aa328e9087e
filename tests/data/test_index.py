"""List folders: the index is sorted and compact, and holds only what belongs to the data set."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from deepvit_train.data import cache
from deepvit_train.data.digits import write_digits
from deepvit_train.data.index import scan_split
from deepvit_train.error import DataError
from tests.watch import watching


def files_of(root: Path, split: str = "train", follow_links: bool = False) -> list[str]:
    index = scan_split(root, split, follow_links)
    return [index.path(image) for image in range(len(index))]


def test_the_digits_are_always_split_the_same(tmp_path: Path) -> None:
    write_digits(tmp_path)
    files = sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.png"))
    assert len(files) == 1797
    assert sum(file.parts[0] == "val" for file in files) == 364
    assert hashlib.sha256("".join(map(str, files)).encode()).hexdigest()[:16] == "a2790dae83f388be"


def test_an_index_is_that_of_torchvision(image_folder: Path) -> None:
    for name in ("bee/deep/er/z.JPG", "bee/deep/a.webp", "bee/note.txt", "ant/ü.png"):
        (image_folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (image_folder / "train" / name).write_bytes(b"")
    index = scan_split(image_folder, "train", False)
    theirs = ImageFolder(str(image_folder / "train"))
    assert index.classes == theirs.classes
    ours = [(index.path(image), int(index.targets[image])) for image in range(len(index))]
    assert ours == theirs.samples
    assert len(ours) == 27


def test_hidden_files_and_folders_are_left_out(image_folder: Path) -> None:
    before = files_of(image_folder)
    (image_folder / "train" / ".ipynb_checkpoints").mkdir()
    (image_folder / "train" / "ant" / "._0.png").write_bytes(b"")
    assert files_of(image_folder) == before


def test_what_is_wrong_with_a_folder_is_named(image_folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds train, val"):
        scan_split(image_folder, "test", False)
    (image_folder / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="no image in class dog"):
        scan_split(image_folder, "val", False)


def test_images_outside_class_folders_are_counted(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for number in range(3):
        (tmp_path / "val" / f"{number}.jpg").touch()
    with pytest.raises(DataError, match=r"no class folders.*\n3 images lie in it directly: sort them"):
        scan_split(tmp_path, "val", False)


def test_a_class_name_that_can_not_be_shown_is_refused(image_folder: Path) -> None:
    os.mkdir(os.fsencode(image_folder / "train") + b"/b\xffd")  # noqa: PTH102 - a name that is not UTF-8
    with pytest.raises(DataError, match=r"b\\\\udcffd"):
        scan_split(image_folder, "train", False)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "\u202eabc"])
def test_a_class_name_that_changes_a_terminal_is_refused(image_folder: Path, name: str) -> None:
    (image_folder / "train" / name).mkdir()
    with pytest.raises(DataError, match="has a name that can't be shown"):
        scan_split(image_folder, "train", False)


@pytest.mark.parametrize("name", ["क्\u200dष", "cat \U0001f468\u200d\U0001f373", "a\u00a0b", "猫\u3000犬"])
def test_a_class_may_have_a_name_in_any_script(image_folder: Path, name: str) -> None:
    (image_folder / "train" / "ant").rename(image_folder / "train" / name)
    assert name in scan_split(image_folder, "train", False).classes


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere" / "dog"
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("what", ["dog", "dog/x.png"])
def test_a_link_out_of_the_data_set_is_refused_unless_allowed(
    image_folder: Path, elsewhere: Path, what: str
) -> None:
    link = image_folder / "train" / ("dog" if what == "dog" else "ant/x.png")
    link.symlink_to(elsewhere.parent / what)
    with pytest.raises(DataError, match=rf"{link}: a link that leads out of .*data\.follow_links=true"):
        scan_split(image_folder, "train", False)
    assert len(files_of(image_folder, follow_links=True)) == 25


def test_links_inside_the_data_set_are_followed(image_folder: Path) -> None:
    (image_folder / "train" / "wasp").symlink_to("bee")
    (image_folder / "train" / "ant" / "x.png").symlink_to("../../val/ant/0.png")
    assert len(files_of(image_folder)) == 24 + 8 + 1


def test_the_root_and_its_splits_may_be_links(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(image_folder / "train")
    (tmp_path / "link").symlink_to(root)
    assert len(files_of(tmp_path / "link")) == 24
    # But from there no further.
    (image_folder / "train" / "ant" / "x.png").symlink_to("../../val/ant/0.png")
    with pytest.raises(DataError, match="leads out of"):
        scan_split(root, "train", False)


@pytest.mark.parametrize("target", ["..", "../ant", "../../train", "."])
def test_a_circle_of_links_is_named(image_folder: Path, target: str) -> None:
    (image_folder / "train" / "ant" / "again").symlink_to(target)
    for follow_links in (False, True):
        with pytest.raises(DataError, match=r"again: a link that leads back"):
            scan_split(image_folder, "train", follow_links)


@pytest.fixture
def settled(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that hasn't changed for a while, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "COARSEST_TICK_S", -3600.0)
    return image_folder


def test_an_index_is_kept(settled: Path) -> None:
    touched: list[str] = []
    with watching(settled, touched.append):
        before = files_of(settled)
    assert str(settled / "train" / "bee") in touched  # what listing it anew looks like
    touched.clear()
    with watching(settled, touched.append):
        assert files_of(settled) == before
        index = scan_split(settled, "train", False)
    assert (index.classes, index.targets.tolist()) == (["ant", "bee", "cat"], [0] * 8 + [1] * 8 + [2] * 8)
    assert not touched
    assert len(files_of(settled, "val")) == 9


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "train/ant/new.png").write_bytes(b""),
        lambda root: (root / "train/ant/0.png").unlink(),
        lambda root: (root / "train/ant/0.png").rename(root / "train/ant/00.png"),
        lambda root: (root / "train/dog").symlink_to(root / "train/ant"),
        lambda root: (root / "train/ant").rename(root / "train/aunt"),
        lambda root: (root / "train/bee/deep/new.png").write_bytes(b""),
    ],
)
def test_a_changed_folder_is_listed_again(settled: Path, change: Callable[[Path], object]) -> None:
    (settled / "train" / "bee" / "deep").mkdir()
    before = files_of(settled)
    assert files_of(settled) == before
    change(settled)
    after = files_of(settled)
    assert after != before
    assert after == sorted(after)
    assert all(Path(file).parent.is_dir() for file in after)


def test_a_folder_that_just_changed_is_not_trusted(
    settled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cache, "COARSEST_TICK_S", 2.0)
    before = files_of(settled)
    assert not (tmp_path / "cache" / "deepvit_train" / "index").exists()
    old = time.time() - 100
    for place in [settled / "train", *(settled / "train").iterdir()]:
        os.utime(place, (old, old))  # as a copying program sets it; the time of this change can't be set
    assert files_of(settled) == before
    assert not (tmp_path / "cache" / "deepvit_train" / "index").exists()


@pytest.mark.parametrize("content", [b"", b"PK", None])
def test_a_damaged_or_unwritable_cache_is_no_error(
    settled: Path, tmp_path: Path, content: bytes | None
) -> None:
    before = files_of(settled)
    (kept,) = (tmp_path / "cache" / "deepvit_train" / "index").iterdir()
    if content is None:
        kept.unlink()
        kept.parent.rmdir()
        kept.parent.write_bytes(b"")
    else:
        kept.write_bytes(content)
    assert files_of(settled) == before


def test_no_byte_of_a_damaged_cache_matters(settled: Path, tmp_path: Path) -> None:
    before = files_of(settled)
    (kept,) = (tmp_path / "cache" / "deepvit_train" / "index").iterdir()
    whole = kept.read_bytes()
    for place in [*range(0, len(whole) // 2, 31), *range(len(whole) // 2, len(whole), 3)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        kept.write_bytes(damaged)
        assert files_of(settled) == before, place


def test_a_link_that_comes_to_lead_out_by_another_is_seen(settled: Path, elsewhere: Path) -> None:
    (settled / "pool").mkdir()
    (settled / "pool" / "x.png").write_bytes(b"")
    (settled / "train" / "ant" / "x.png").symlink_to("../../pool/x.png")
    assert len(files_of(settled)) == 25
    (settled / "pool" / "x.png").unlink()
    (settled / "pool" / "x.png").symlink_to(elsewhere / "x.png")
    with pytest.raises(DataError, match="leads out of"):
        files_of(settled)


def test_a_link_to_nothing_is_an_image_like_others(settled: Path) -> None:
    (settled / "train" / "ant" / "x.png").symlink_to("../../gone/x.png")
    assert len(files_of(settled)) == 25


def test_the_same_folder_with_links_followed_is_another_index(settled: Path, elsewhere: Path) -> None:
    (settled / "train" / "ant" / "x.png").symlink_to(elsewhere / "x.png")
    assert len(files_of(settled, follow_links=True)) == 25
    with pytest.raises(DataError, match="leads out of"):
        files_of(settled)
