"""Images without labels are found in every form they are given in, and read in the order that is promised."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from deepvit_train.data.unlabelled import find_images
from deepvit_train.error import DataError

NOTHING = io.BytesIO()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images at several depths, and what is no image."""
    for name in ("b.jpg", "a/z.png", "a/deep/er/y.jpg", "c/x.PNG", "notes.txt", ".hidden.png"):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"content")
    return tmp_path / "photos"


def paths(images: str, listed: bytes = b"", follow_links: bool = False) -> list[str]:
    index = find_images(images, io.BytesIO(listed), follow_links)
    return [index.path(number) for number in range(len(index))]


def test_a_folder_at_any_depth_its_own_images_first(photos: Path) -> None:
    expected = [f"{photos}/{name}" for name in ("b.jpg", "a/z.png", "a/deep/er/y.jpg", "c/x.PNG")]
    assert paths(str(photos)) == expected
    assert find_images(str(photos), NOTHING, False).left_out == {".txt": 1}


def test_names_are_as_they_were_typed(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    assert paths("photos/a") == ["photos/a/z.png", "photos/a/deep/er/y.jpg"]
    assert paths("photos/b.jpg") == ["photos/b.jpg"]
    assert paths("-", b"photos/b.jpg\n\n/x/y.png\r\nphotos/b.jpg") == [
        "photos/b.jpg",
        "/x/y.png",
        "photos/b.jpg",
    ]


def test_a_list_whose_paths_end_with_nul_may_hold_line_breaks() -> None:
    odd = b"a\nb.jpg\0\xff.png\0"
    assert [os.fsencode(path) for path in paths("-", odd)] == [b"a\nb.jpg", b"\xff.png"]


def test_a_tar_file(photos: Path) -> None:
    with tarfile.open(photos.parent / "some.tar", "w") as tar:
        tar.add(photos / "c/x.PNG", "c/x.PNG")
        tar.add(photos / "b.jpg", "b.jpg")
    index = find_images(f"{photos.parent}/some.tar", NOTHING, False)
    assert sorted(index.path(number) for number in range(2)) == [
        f"{photos.parent}/some.tar/b.jpg",
        f"{photos.parent}/some.tar/c/x.PNG",
    ]
    assert index.read(0, 100) == b"content"


def test_links_out_of_the_folder_are_followed_on_request(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.jpg").write_bytes(b"content")
    (photos / "d").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"data\.follow_links=true"):
        paths(str(photos))
    assert paths(str(photos), follow_links=True)[-1] == f"{photos}/d/w.jpg"


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ("photo", "no such file or folder; did you mean 'photos'"),
        ("photos/empty", "holds no image .*left out: 1 .txt"),
        ("-", "the list on stdin is empty"),
        ("~nobody-of-this-name/x", "can't be read"),
    ],
)
def test_nothing_to_read_is_told(
    photos: Path, images: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    (photos / "empty").mkdir()
    (photos / "empty" / "x.txt").touch()
    with pytest.raises(DataError, match=told):
        paths(images)
