"""Read small files that ask for much: each is refused before it gets the memory or the time."""

from __future__ import annotations

import io
import os
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from deepvit_train.data import jpeg
from deepvit_train.data.decode import BadImageError, Limits, parse_picture
from deepvit_train.data.digits import digits_root
from deepvit_train.data.index import scan_tars
from deepvit_train.error import DataError
from tests.conftest import Command, forked

LIMITS = Limits(max_bytes=2**28, max_pixels=10**6)
ROOM = 2**28  # bytes more than the test itself has
HUGE = 60_000


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def webp() -> bytes:
    """An animation whose head asks for two canvases of 16383 x 16383, 1 GiB each."""
    frames = [Image.new("RGB", (10, 10), (255 * number, 0, 0)) for number in range(2)]
    content = bytearray(saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    assert content[12:16] == b"VP8X"
    content[24:30] = 2 * (16382).to_bytes(3, "little")
    return bytes(content)


def gif(screen: int) -> bytes:
    """A frame of 60000 x 60000 whose place is to be cleared afterwards, on a small screen or a large one."""
    head = b"GIF89a" + struct.pack("<HH", screen, screen) + b"\x80\0\0" + bytes(6)
    cleared = b"\x21\xf9\x04\x08\0\0\0\0"
    return head + cleared + b"," + struct.pack("<HHHH", 0, 0, HUGE, HUGE) + b"\0\x02\x02\x4c\x01\x00;"


def tiff_tile() -> bytes:
    """An image of 16 x 16 in one tile of 30000 x 30000 zeros, which deflate packs into a megabyte."""
    side, packer = 30_000, zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(side * 1000)) for _ in range(30)) + packer.flush()
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, side), (323, side), (324, 8 + 2 + 12 * 10 + 4), (325, len(body))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + body


def heads() -> dict[str, bytes]:
    """Files that have a head with a size, and hardly more."""
    bitmap = struct.pack("<IiiHHIIiiII", 40, HUGE, HUGE, 1, 24, 0, 0, 0, 0, 0, 0)
    surface = struct.pack("<8I", 32, 4, 0x31545844, 0, 0, 0, 0, 0)  # DXT1
    return {
        "BMP": b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + bitmap,
        "QOI": b"qoif" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + b"\x03\0" + bytes(8),
        "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, HUGE, HUGE, 8, 3) + bytes(14),
        "PPM": b"P6 60000 60000 255\n",
        "PCX": b"\x0a\x05\x01\x08"
        + struct.pack("<HHHH", 0, 0, HUGE, HUGE)
        + bytes(53)
        + b"\x03"
        + struct.pack("<H", HUGE)
        + bytes(60),
        "SGI": struct.pack(">hbbHHHH", 474, 1, 1, 3, HUGE, HUGE, 3) + bytes(500),
        "SUN": struct.pack(">8I", 0x59A66A95, HUGE, HUGE, 24, 0, 1, 0, 0),
        "DDS": b"DDS "
        + struct.pack("<7I", 124, 0x1007, HUGE, HUGE, 0, 0, 0)
        + bytes(44)
        + surface
        + bytes(20),
    }


def in_little_room(work: Callable[[], None]) -> None:
    """Run in a copy of this process that may have ROOM more memory. A MemoryError fails the test."""

    def limited() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        work()

    assert forked(limited) == 0


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(webp(), id="WEBP"),
        pytest.param(gif(HUGE), id="GIF"),
        pytest.param(gif(10), id="GIF on a small screen"),
        pytest.param(tiff_tile(), id="TIFF tile"),
        pytest.param(saved(Image.new("L", (9000, 9000)), "JPEG2000"), id="JPEG2000"),
        pytest.param(saved(Image.new("L", (9000, 9000)), "AVIF", speed=10), id="AVIF"),
        *(pytest.param(content, id=kind) for kind, content in heads().items()),
    ],
)
def test_a_size_beyond_the_limit_is_refused_before_there_is_memory_for_it(content: bytes) -> None:
    def work() -> None:
        with pytest.raises(BadImageError, match=r"pixels, more than data\.max_pixels=1000000"):
            parse_picture("file", content, LIMITS).pixels()

    assert len(content) < 10**6
    in_little_room(work)


def scans(count: int, between: bytes = b"", behind: bytes = b"") -> bytes:
    """A progressive JPEG with so many scans more than the six of Pillow's grey ones, and segments between."""
    whole = saved(Image.new("L", (2000, 2000), 100), "JPEG", progressive=True)
    last, end = whole.rindex(b"\xff\xda"), whole.rindex(b"\xff\xd9")
    return whole[:end] + (between + whole[last:end]) * count + whole[end:] + behind


def test_thousands_of_scans_are_counted_and_not_decoded() -> None:
    content = scans(20_000)
    assert len(content) < 300_000
    for hidden in (
        content,
        scans(20_000, between=b"\xff\xfe\x00\x04\xff\xd9"),
        b"\xff\xd8\xff\x00" + content[2:],
    ):
        started = time.perf_counter()
        with pytest.raises(BadImageError, match="file: more than 100 scans"):
            parse_picture("file", hidden, LIMITS)
        assert time.perf_counter() - started < 1


def test_scans_that_are_none_are_not_counted() -> None:
    fake = b"\xff\xfe\x00\xff" + b"\xff\xda" * 126 + b"\0"
    six = scans(0)
    limits = Limits(2**28, 10**7)
    for content in (
        six,
        scans(1, between=fake),
        scans(0, behind=b"\xff\xda" * 1000),
        fake.join([six[:2], six[2:]]),
    ):
        assert not jpeg.has_many_scans(content, jpeg.read_head(content))
        parse_picture("file", content, limits)
    plain = saved(Image.new("RGB", (20, 30)), "JPEG") + b"\xff\xda" * 1000
    assert parse_picture("file", plain, limits).pixels()[0].shape == (30, 20, 3)


def header(name: str, kind: bytes, size: int) -> bytes:
    """A tar header, with any size."""
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, max(0, size)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, kind, len(content)) + content + bytes(-len(content) % 512)


PNG = saved(Image.new("RGB", (5, 5)), "PNG")
END = bytes(1024)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header("a/x.png", tarfile.REGTYPE, -512) + END, "bytes"),
        (header("a/x.png", tarfile.REGTYPE, -1024) + END, "bytes"),
        (member("a/x.png", PNG) + header("a/y.txt", tarfile.REGTYPE, -2048) + END, "bytes"),
        (header("p", tarfile.XHDTYPE, 30 * 2**30) + END, "a header of 32212254720 bytes"),
        (header("p", tarfile.XGLTYPE, 30 * 2**30) + END, "a header of 32212254720 bytes"),
        (header("p", tarfile.GNUTYPE_LONGNAME, 30 * 2**30) + END, "a header of 32212254720 bytes"),
        (member("p", b"20 size=-9999999999\n", tarfile.XHDTYPE) + member("a/x.png", PNG) + END, "bytes"),
        (member("p", b"34 size=" + b"9" * 25 + b"\n", tarfile.XHDTYPE) + member("a/x.png", PNG) + END, ""),
        (member("p", b"10 x=yyyy\n", tarfile.XHDTYPE) * 2000 + member("a/x.png", PNG) + END, ""),
        (member("a/x.png", PNG) + b"garbage" * 200 + member("a/y.png", PNG) + END, "no header at byte 1024"),
        (
            member("p", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", tarfile.XHDTYPE)
            + member("a/x.png", b"9999999\n1\n" * 40)
            + END,
            "",
        ),
        (header("a/x.png", tarfile.GNUTYPE_SPARSE, 512) + bytes(512) + END, "sparse"),
        (b"", "empty"),
    ],
    ids=str,
)
def test_a_hostile_tar_file_is_refused_in_a_line(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "train.tar").write_bytes(content)

    def work() -> None:
        with pytest.raises(DataError, match=rf"train\.tar.*{reason}") as error:
            scan_tars(tmp_path, "train")
        assert str(error.value).isprintable()

    started = time.perf_counter()
    in_little_room(work)
    assert time.perf_counter() - started < 5


def test_links_in_a_tar_file_are_never_followed(tmp_path: Path) -> None:
    around = [tarfile.TarInfo("a/1.png"), tarfile.TarInfo("a/2.png"), tarfile.TarInfo("a/2.cls")]
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for one, target in zip(around, ("a/2.png", "a/1.png", "a/2.cls"), strict=True):
            one.type, one.linkname = tarfile.LNKTYPE, target
            archive.addfile(one)
        good = tarfile.TarInfo("a/3.png")
        good.size = len(PNG)
        archive.addfile(good, io.BytesIO(PNG))
    index = scan_tars(tmp_path, "train")
    assert (len(index), index.left_out) == (1, {"links": 3})


def test_a_pipe_in_place_of_a_tar_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    os.mkfifo(tmp_path / "train" / "x.tar")
    with pytest.raises(DataError, match="not a regular file"):
        scan_tars(tmp_path, "train")
    (tmp_path / "train" / "x.tar").unlink()
    (tmp_path / "train" / "x.tar").write_bytes(member("a/x.png", PNG) + END)
    index = scan_tars(tmp_path, "train")
    (tmp_path / "train" / "x.tar").unlink()
    os.mkfifo(tmp_path / "train" / "x.tar")
    with pytest.raises(BadImageError):
        index.read(0, 10**6)


@pytest.mark.parametrize("lost", ["train/3", "val", "train/0/first", "everything in val"])
def test_half_a_cache_of_the_digits_is_noticed_and_the_folder_named(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = digits_root()
    if lost.endswith("first"):
        min((root / "train" / "0").iterdir()).unlink()
    elif lost.startswith("everything"):
        for file in (root / "val").rglob("*.png"):
            file.unlink()
    else:
        (root / lost).rename(tmp_path / "elsewhere")
    result = call("train", "run_dir=run")
    assert result.returncode == 4
    assert f"{root}: the embedded digits are no longer whole" in result.stderr
    assert "delete that folder" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_cache_folder_with_a_name_too_long_is_named(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("x" * 256)))
    result = call("train", "run_dir=run")
    assert result.returncode == 4
    assert "set XDG_CACHE_HOME" in result.stderr
