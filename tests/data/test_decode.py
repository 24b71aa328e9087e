"""Decode every kind of image to upright RGB, name what is no image, and decode nothing past the limits."""

from __future__ import annotations

import io
import os
import random
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from deepvit_train.data.decode import FORMATS, BadImageError, Limits, Picture
from scripts.photographs import photographs
from tests.data.picture import open_picture

LIMITS = Limits(max_bytes=10**8, max_pixels=10**8)


def pixels_of(path: Path, shrink: int = 1) -> np.ndarray:
    picture = open_picture(str(path), LIMITS)
    pixels, factor = picture.pixels(shrink)
    assert pixels.shape == (-(-picture.height // factor), -(-picture.width // factor), 3)
    assert pixels.dtype == np.uint8
    return pixels


OLD_PILLOW = pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow reads it from 13 on")
MODES = [
    "1",
    "L",
    "LA",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    pytest.param("YCbCr", marks=OLD_PILLOW),
    "I;16",
    "I",
    "F",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_pixel_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        scaled = {"I": grey.astype(np.int32) * 257, "F": (grey / 255).astype(np.float32)}
        image = Image.fromarray(scaled[mode])
    else:
        image = Image.fromarray(grey).convert(mode)
    file = tmp_path / "image.png"
    image.save(file, "PNG" if mode == "I;16" else "TIFF")
    loaded = pixels_of(file)
    assert loaded.shape == (8, 8, 3)
    if mode not in ("1", "P"):
        assert np.abs(loaded[:, :, 0].astype(int) - grey).max() <= 2


def test_deep_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for values, expected in (
        (ramp, ramp // 257),  # a dark 16-bit image stays dark
        (ramp * 256, ramp),
        ((ramp / 255).astype(np.float32), ramp),
        (ramp.astype(np.int32) * 257, ramp),
        (np.full((16, 16), np.nan, np.float32), ramp * 0),
    ):
        Image.fromarray(values).save(tmp_path / "deep.tiff")
        found = pixels_of(tmp_path / "deep.tiff")[:, :, 1].astype(int)
        assert np.abs(found - expected).max() <= 1


def test_a_portable_map_of_16_bits_keeps_its_range(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "dark.ppm")
    assert (tmp_path / "dark.ppm").read_bytes().startswith(b"P5")
    assert pixels_of(tmp_path / "dark.ppm").max() <= 1


DEEP = {
    "12 bits in 16": (np.array([[0, 1024, 2048, 4095]], np.uint16), (0, 4095), [0, 63, 127, 255]),
    "floats": (np.array([[-3.0, 0.0, 47.0, 97.0]], np.float32), (-3, 97), [0, 7, 127, 255]),
    "32 bits": (np.array([[0, 10, 100, 200]], np.int32), (0, 200), [0, 12, 127, 255]),
    "a window": (np.array([[0, 10, 100, 200]], np.uint16), (10, 100), [0, 0, 255, 255]),
}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("kind", ["TIFF", "PNG"])
def test_deep_values_have_the_scale_of_the_data_set(tmp_path: Path, name: str, kind: str) -> None:
    """A dark image and a bright one are scaled alike: not by what each holds."""
    values, span, expected = DEEP[name]
    if kind == "PNG" and values.dtype != np.uint16:
        pytest.skip("PNG has no such values")
    for chosen in (slice(None), slice(0, 2), slice(2, 4)):
        Image.fromarray(values[:, chosen]).save(tmp_path / "deep", kind)
        picture = open_picture(str(tmp_path / "deep"), replace(LIMITS, value_range=span))
        assert picture.pixels()[0][0, :, 0].tolist() == expected[chosen]
        assert picture.extent == [values[:, chosen].min(), values[:, chosen].max()]


@pytest.mark.parametrize("values", [[0.0, 1.5], [-0.5, 1.0], [0, 70_000], [-1, 5], [0.0, np.inf]])
def test_deep_values_beyond_the_usual_are_refused_with_the_key(tmp_path: Path, values: list[float]) -> None:
    whole = all(isinstance(value, int) for value in values)
    Image.fromarray(np.array([values], np.int32 if whole else np.float32)).save(tmp_path / "deep.tiff")
    assert "set data.value_range, which deepvit-data check finds" in bad(tmp_path / "deep.tiff", LIMITS)


def test_colours_of_16_bits_are_not_cut_to_8_unseen_where_a_range_is_given(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 4, 3), 4095, np.uint16))
    assert pixels_of(tmp_path / "deep.png").max() == 15
    assert "16 bits a colour" in bad(tmp_path / "deep.png", replace(LIMITS, value_range=(0, 4095)))


@pytest.mark.parametrize("chunk", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_with_megabytes_of_text_is_whole(tmp_path: Path, chunk: bytes) -> None:
    text = random.Random(0).randbytes(1_000_000).hex().encode()  # 2 MB
    content = {
        b"tEXt": b"Comment\0" + text,
        b"zTXt": b"Comment\0\0" + zlib.compress(text),
        b"iTXt": b"Comment\0\1\0\0\0" + zlib.compress(text),
        b"iCCP": b"profile\0\0" + zlib.compress(text),
    }[chunk]
    buffer = io.BytesIO()
    expected = next(photographs(1)).resize((60, 40))
    expected.save(buffer, "PNG")
    png, end = buffer.getvalue(), 33  # behind the signature and IHDR
    piece = chunk + content
    piece = len(content).to_bytes(4, "big") + piece + zlib.crc32(piece).to_bytes(4, "big")
    for place in (end, len(png) - 12):  # before the pixels, and behind them
        (tmp_path / "text.png").write_bytes(png[:place] + piece + png[place:])
        assert np.array_equal(pixels_of(tmp_path / "text.png"), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "CMYK"])
def test_an_image_is_turned_upright(tmp_path: Path, orientation: int, kind: str) -> None:
    photograph = next(photographs(1)).resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "turned.jpg"
    photograph.convert("CMYK" if kind == "CMYK" else "RGB").save(
        file, "PNG" if kind == "PNG" else "JPEG", exif=exif
    )
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    picture = open_picture(str(file), LIMITS)
    assert (picture.width, picture.height) == expected.size
    assert np.array_equal(pixels_of(file), np.asarray(expected))


@pytest.mark.parametrize(
    "exif", [b"", b"\xff\xd8", b"MM\x00*\x00\x00\x00\x08\xff\xff", b"II*\x00" + bytes(40)]
)
def test_an_image_with_damaged_metadata_is_good(tmp_path: Path, exif: bytes) -> None:
    file = tmp_path / "image.jpg"
    Image.new("RGB", (6, 4)).save(file, exif=b"Exif\x00\x00" + exif)
    assert pixels_of(file).shape == (4, 6, 3)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"keep_rgb": True}, {"optimize": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_are_decoded_as_pillow_decodes_them(
    tmp_path: Path, mode: str, options: dict[str, bool]
) -> None:
    for number, photograph in enumerate(photographs(5)):
        file = tmp_path / f"{number}.jpg"
        photograph.convert(mode).save(file, quality=80, **options)
        assert np.array_equal(pixels_of(file), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"subsampling": 1},
        {"restart_marker_blocks": 7},
        {"optimize": True},
        {"progressive": True},
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_decoded_no_further_than_the_rows_that_are_wanted(
    tmp_path: Path, mode: str, options: dict[str, int]
) -> None:
    for number, photograph in enumerate(photographs(3)):
        file = tmp_path / f"{number}.jpg"
        photograph.convert(mode).save(file, quality=80, **options)
        whole, picture = pixels_of(file), open_picture(str(file), LIMITS)
        for rows in (1, 15, 16, 17, 150, picture.height - 1, picture.height):
            upper, _ = picture.pixels(rows=rows)
            assert np.array_equal(upper[:rows], whole[:rows])
            decoded_all = len(upper) == picture.height
            assert decoded_all == (bool(options.get("progressive")) or rows > picture.height - 16)
        for shrink in (2, 4, 8):
            shrunk, factor = picture.pixels(shrink, rows=152)
            assert np.array_equal(shrunk[: 152 // factor], picture.pixels(shrink)[0][: 152 // factor])


def test_damage_above_the_rows_that_are_wanted_reads_as_pillow_reads_it(tmp_path: Path) -> None:
    """And the end of a file is missed, though it lies below."""
    file = tmp_path / "image.jpg"
    next(photographs(1)).save(file, quality=80)
    whole = bytearray(file.read_bytes())
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole) // 4, len(whole) // 2, 40):
        damaged = whole.copy()
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        upper, _ = open_picture(str(file), LIMITS).pixels(rows=200)
        assert np.array_equal(upper[:200], np.asarray(Image.open(file).convert("RGB"))[:200])
    file.write_bytes(whole[: len(whole) * 9 // 10])
    with pytest.raises(BadImageError):
        open_picture(str(file), LIMITS).pixels(rows=16)


def test_damage_below_the_rows_that_are_wanted_is_as_bad_as_in_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    next(photographs(1)).save(file, quality=80)
    whole = bytearray(file.read_bytes())
    rng = np.random.default_rng(0)
    verdicts = []
    for size in rng.integers(1, 400, 60):
        damaged, place = whole.copy(), len(whole) * 3 // 4
        damaged[place : place + size] = rng.bytes(size)
        file.write_bytes(damaged)
        picture = open_picture(str(file), LIMITS)
        verdicts.append([_is_bad(picture, rows) for rows in (picture.height, 16, picture.height // 2)])
    assert all(len(set(one)) == 1 for one in verdicts)
    assert 10 < sum(one[0] for one in verdicts) < 50


def _is_bad(picture: Picture, rows: int) -> bool:
    try:
        picture.pixels(rows=rows)
    except BadImageError:
        return True
    return False


def test_a_subsampling_without_a_name_is_read_by_pillow(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    next(photographs(1)).resize((32, 32)).save(file, subsampling=2)
    content = bytearray(file.read_bytes())
    frame = content.index(b"\xff\xc0")
    assert content[frame + 11] == 0x22  # four blocks of luma to one of each colour: in a square,
    content[frame + 11] = 0x14  # and now above each other, which is 4:4:1
    file.write_bytes(content)
    assert np.array_equal(pixels_of(file), np.asarray(Image.open(file).convert("RGB")))


def test_metadata_behind_a_marker_without_a_segment_are_found(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (6, 4)).save(file, exif=exif)
    content = file.read_bytes()
    file.write_bytes(content[:2] + b"\xff\xd0" + content[2:])
    assert pixels_of(file).shape == (6, 4, 3)


@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("size", [(640, 480), (641, 481), (7, 1000), (1, 1), (8, 9)])
def test_a_jpeg_is_shrunk_while_it_is_decoded(tmp_path: Path, size: tuple[int, int], shrink: int) -> None:
    file = tmp_path / "image.jpg"
    photograph = next(photographs(1)).resize(size)
    photograph.save(file, quality=95)
    shrunk = open_picture(str(file), LIMITS).pixels(shrink)
    assert shrunk[1] == shrink
    expected = np.asarray(Image.open(file).reduce(shrink)).astype(int)
    if min(size) > 8 * shrink:
        assert np.abs(pixels_of(file, shrink) - expected).mean() < 2


def test_an_image_is_known_by_its_content(tmp_path: Path) -> None:
    photograph = next(photographs(1)).resize((40, 30))
    for kind, name in (
        ("JPEG", "a.png"),
        ("PNG", "b.jpg"),
        ("GIF", "c.jpeg"),
        ("WEBP", "d.bmp"),
        ("BMP", "e.tif"),
    ):
        photograph.save(tmp_path / name, kind)
        assert pixels_of(tmp_path / name).shape == (30, 40, 3)


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (5, 5), (40 * number, 0, 0)) for number in range(1, 4)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        frames[0].save(tmp_path / "moving.gif", kind, save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(pixels_of(tmp_path / "moving.gif"), np.asarray(frames[0]))


def bad(path: Path, limits: Limits = LIMITS) -> str:
    with pytest.raises(BadImageError) as error:
        open_picture(str(path), limits).pixels()
    line = str(error.value)
    assert line.startswith(str(path))
    assert "0x" not in line
    return line


@pytest.mark.parametrize(
    "content",
    [b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"\xff\xd8\xff\xe1" + b"\xff" * 99],
)
def test_what_is_no_image_is_bad(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    bad(tmp_path / "bad.png")


@pytest.mark.parametrize("kind", sorted(set(FORMATS) & set(Image.SAVE)))
def test_a_truncated_file_is_bad(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    next(photographs(1)).resize((64, 48)).save(buffer, kind)
    whole = buffer.getvalue()
    (tmp_path / "whole").write_bytes(whole)
    assert pixels_of(tmp_path / "whole").shape == (48, 64, 3)
    for share in (0.02, 0.3, 0.5, 0.9, 0.97):
        (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
        bad(tmp_path / "cut")


@pytest.mark.parametrize("kind", sorted(set(FORMATS) & set(Image.SAVE)))
def test_a_flipped_file_is_read_or_bad_and_no_larger_than_allowed(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    next(photographs(1)).resize((64, 48)).save(buffer, kind)
    for seed in range(100):
        draws, content = random.Random(seed), bytearray(buffer.getvalue())
        for _ in range(draws.randrange(1, 6)):
            content[draws.randrange(min(400, len(content)))] = draws.randrange(256)
        (tmp_path / "flipped").write_bytes(content)
        try:
            pixels, _ = open_picture(str(tmp_path / "flipped"), Limits(10**6, 40_000)).pixels()
        except BadImageError:
            continue
        assert pixels.shape[0] * pixels.shape[1] <= 40_000


def test_the_limit_of_pillow_is_that_of_others_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A higher data.max_pixels than Pillow's limit counts, and only here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (60, 60)).save(tmp_path / "image.png")
    assert open_picture(str(tmp_path / "image.png"), LIMITS).pixels()[0].shape == (60, 60, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_file_is_looked_at_before_it_is_read_or_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "image.png")
    size = (tmp_path / "image.png").stat().st_size
    assert f"{size} bytes, more than data.max_bytes=10" in bad(tmp_path / "image.png", Limits(10, 10**6))
    assert "100 x 100 pixels, more than data.max_pixels=9999" in bad(
        tmp_path / "image.png", Limits(10**6, 9999)
    )
    # Nor is it decoded for its metadata, as Pillow decodes a PNG.
    decoded: list[object] = []
    load = PngImagePlugin.PngImageFile.load
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: decoded.append(self) or load(self))
    bad(tmp_path / "image.png", Limits(10**6, 9999))
    assert not decoded
    # A file of 3 kB that would fill 30 GB.
    bomb = bytearray((tmp_path / "image.png").read_bytes())
    bomb[16:24] = (100_000).to_bytes(4, "big") + (100_000).to_bytes(4, "big")
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    assert "10000000000 pixels, more than data.max_pixels" in bad(tmp_path / "bomb.png")


def test_what_is_no_regular_file_is_bad(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "an empty file" in bad(tmp_path / "empty.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a regular file" in bad(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    bad(tmp_path / "folder.jpg")
    (tmp_path / "nowhere.jpg").symlink_to(tmp_path / "gone")
    assert "No such file" in bad(tmp_path / "nowhere.jpg")


def test_a_program_is_never_run_for_an_image(tmp_path: Path) -> None:
    (tmp_path / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    assert "cannot identify" in bad(tmp_path / "script.jpg")


def test_a_name_can_not_write_to_the_terminal(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\x1b[31m\n\xff.png"))
    file.write_bytes(b"")
    with pytest.raises(BadImageError) as error:
        open_picture(str(file), LIMITS)
    assert str(error.value).isprintable()
    assert "\\x1b[31m\\n\\udcff.png: an empty file" in str(error.value)
