"""From a file to upright RGB pixels, whatever its kind. A file is judged by its content, never by its name.

JPEGs are decoded by libjpeg-turbo through simplejpeg, everything else and every odd JPEG by Pillow. Both give
the same pixels (docs/decisions/0009-image-decoding.md).

Shapes: H height, W width.
"""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from deepvit_train.data import jpeg

# Pillow's own limit, a constant, would stand in the way of a higher data.max_pixels.
Image.MAX_IMAGE_PIXELS = None

# What a file may hold, as far as this Pillow reads it. Left out are formats that run other programs (EPS),
# that are decoded before their size is known (ICO), and those that nobody keeps photographs in.
Image.init()
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = [name for name in _WANTED if name in Image.OPEN]

UNSAFE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: control, surrogate, line and paragraph separators
TURNING = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class BadImageError(Exception):
    """A file that can't be read as an image; the message names it and says why."""

    def __init__(self, path: str, reason: object) -> None:
        # Without the addresses of objects: the same file gives the same line in every process.
        plain = re.sub(r"<.* object at 0x\w+>", "the file", str(reason).strip() or type(reason).__name__)
        super().__init__(printable(f"{path}: {plain}"))


def printable(text: str) -> str:
    """Text that is safe to print and to write as UTF-8: what moves the cursor, turns the direction of text or
    stands for a raw byte becomes an escape.
    """
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in UNSAFE or letter in TURNING
        else letter
        for letter in text
    )


# For a factor to shrink by and the number of rows that are wanted from the top: (H, W, 3) uint8, upright, of
# these rows or more; and the factor it is really shrunk by, that or 1.
Decode = Callable[[int, int], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Limits:
    """What a file may demand, checked before it is decoded."""

    max_bytes: int
    max_pixels: int


@dataclass(frozen=True)
class Picture:
    """An image whose size is known and whose pixels are not decoded yet."""

    path: str
    width: int
    height: int
    kind: str  # format and Pillow's mode, such as 'JPEG RGB'
    decode: Decode
    damage: list[str] = field(default_factory=list)  # what a decoder complained of, once it is decoded

    def pixels(self, shrink: int = 1, rows: int | None = None) -> tuple[np.ndarray, int]:
        """The upright pixels, (ceil(height / n), ceil(width / n), 3), and n: `shrink`, or 1.

        JPEGs are shrunk by 1, 2, 4 or 8 while they are decoded, which saves most of the time. With `rows` of
        the height, what lies below them may be missing; JPEGs are decoded no further. Raises BadImageError.
        """
        try:
            return self.decode(shrink, self.height if rows is None else rows)
        except MemoryError:
            raise
        except Exception as error:
            # Pillow's decoders raise nearly every kind of exception on broken files; each means the same.
            raise BadImageError(self.path, error) from None


def parse_picture(path: str, data: bytes, max_pixels: int) -> Picture:
    """Look at the head of a file's content. Raises BadImageError."""
    try:
        found = _jpeg(path, data, max_pixels) if data.startswith(b"\xff\xd8\xff") else None
        return found or _general(path, data, max_pixels)
    except (MemoryError, BadImageError):
        raise
    except Exception as error:
        raise BadImageError(path, error) from None


def _check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(path, f"{width} x {height} pixels, more than data.max_pixels={max_pixels}")


def read_file(path: str, max_bytes: int) -> bytes:
    """The content of a file. Raises BadImageError for what is empty, too large or no regular file."""
    try:
        # Not blocking: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with io.FileIO(descriptor) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError(path, "not a regular file")
            if status.st_size > max_bytes:
                raise BadImageError(path, f"{status.st_size} bytes, more than data.max_bytes={max_bytes}")
            data = file.read()
    except OSError as error:
        raise BadImageError(path, error.strerror or error) from None
    if not data:
        raise BadImageError(path, "an empty file")
    return data


def _jpeg(path: str, data: bytes, max_pixels: int) -> Picture | None:
    """A JPEG that simplejpeg reads as Pillow does, or None for the odd ones."""
    try:
        head: tuple[int, int, str, str] = simplejpeg.decode_jpeg_header(data)  # pyright: ignore[reportAssignmentType]
    except (ValueError, KeyError):  # damaged, or a subsampling it has no name for
        return None
    height, width, colours, _ = head
    if colours not in ("YCbCr", "Gray"):
        return None
    _check_size(path, width, height, max_pixels)
    segments = jpeg.read_head(data)
    turned = _orientation(_open(data)) if segments.metadata else 1
    damage: list[str] = []

    def decode(shrink: int, rows: int) -> tuple[np.ndarray, int]:
        rows = height if turned != 1 else rows
        upper, kept = jpeg.cut_below(data, segments, rows, height)
        try:
            pixels = simplejpeg.decode_jpeg(
                upper,
                min_factor=shrink,
                min_height=-(-kept // shrink),
                min_width=-(-width // shrink),
                strict=kept == height,  # else it complains of the data that are left over
            )
        except ValueError as error:
            # Damaged. Pillow decides whether enough is left of it.
            damage.append(str(error))
            return upright(_rgb(_open(data)), turned), 1
        return upright(pixels, turned), shrink

    kind = "JPEG L" if colours == "Gray" else "JPEG RGB"
    return Picture(path, *_turned_size(width, height, turned), kind, decode, damage)


def _general(path: str, data: bytes, max_pixels: int) -> Picture:
    image = _open(data)
    _check_size(path, *image.size, max_pixels)  # before the metadata: to find them Pillow decodes a PNG
    turned = _orientation(image)

    def decode(shrink: int, rows: int) -> tuple[np.ndarray, int]:
        return upright(_rgb(image), turned), 1

    return Picture(path, *_turned_size(*image.size, turned), f"{image.format} {image.mode}", decode)


def _turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation > 4 else (width, height)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns of oddities in metadata, file by file; what matters is whether the pixels can be read.
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or the metadata is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, 3) as EXIF's orientation says."""
    if orientation == 1:
        return pixels
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    # Seen after the transposition: orientations mirrored left to right, and top to bottom.
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels.copy()  # torch takes no negative strides, not even along an axis of one pixel


def _rgb(image: Image.Image) -> np.ndarray:
    """Decode the first frame to (H, W, 3) uint8; alpha is dropped, as timm and torchvision drop it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_eight_bits(image))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))  # a copy: Pillow's own array can't be written


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Grey values of more than 8 bits as uint8; Pillow's own conversion clips them at 255.

    16-bit images, which in a PPM come as 32 bits, span 0..65535. 32-bit ones say nothing of their range: up
    to 1, 255 or 65535, the least that holds their values.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = values.max(initial=0.0)
    if image.mode.startswith("I;16") or (image.format == "PPM" and image.mode == "I"):
        top = 65535.0
    elif image.mode == "F" and top <= 1:
        top = 1.0
    else:
        top = 255.0 if top <= 255 else 65535.0
    return (values * (255.0 / top)).clip(0, 255).astype(np.uint8)
