"""Decode a file of any format to upright RGB pixels. Its content tells the format, never its name.

simplejpeg (libjpeg-turbo) decodes JPEGs. Pillow decodes everything else, and JPEGs that simplejpeg does not
read. Both give the same pixels (docs/decisions/0009-image-decoding.md).

Shapes: H height, W width.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin

from deepvit_train.console import one_line
from deepvit_train.data import jpeg

# A PNG may carry megabytes of text, or of a colour profile, which Pillow unpacks before the pixels.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# The formats that a file may have, if this Pillow reads them. Some are left out because it is dangerous to
# decode them: they run other programs (EPS), are decoded before their size is known (ICO, ICNS, BLP), or are
# unpacked without a limit (FITS). Others are left out because Pillow only recognises them, or because they
# have no signature (docs/maintain/decoding.md).
Image.init()
_WANTED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF")
_WANTED += ("QOI", "PSD", "SGI", "PCX", "SUN", "DDS")
FORMATS = [name for name in _WANTED if name in Image.OPEN]
# MPO is a JPEG with a second picture behind the first.
ENDINGS = frozenset(
    ending for ending, name in Image.registered_extensions().items() if name in (*FORMATS, "MPO")
)

# O_NONBLOCK, because opening a pipe would wait for its writer; O_NOCTTY, because a terminal would be taken.
OPENING = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

TILE_WIDTH, TILE_LENGTH = 322, 323  # of TIFF


class BadImageError(Exception):
    """A file can't be read as an image. The message names the file and the reason."""

    def __init__(self, path: str, reason: object) -> None:
        # Addresses of objects are removed, so that the same file gives the same line in every process.
        plain = re.sub(r"<.* object at 0x\w+>", "the file", str(reason).strip() or type(reason).__name__)
        super().__init__(one_line(f"{path}: {plain}"))


class UnreadableError(BadImageError):
    """The system gives no content of a file. `number` is the system's error number."""

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(path, error.strerror or error)
        self.number = error.errno or 0


# Takes a factor to shrink by, and how many rows from the top are wanted. Returns upright pixels (H, W, 3),
# uint8, with at least those rows, and the factor that was used: the one asked for, or 1.
Decode = Callable[[int, int], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class Limits:
    """What a file may demand, checked before it is decoded, and what values of more than 8 bits mean.

    Args:
        max_bytes, max_pixels: of the largest file and of the largest image that are read.
        value_range: the values that become black and white; None: 0 and 65535, or 0 and 1 for floats.
    """

    max_bytes: int
    max_pixels: int
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Picture:
    """An image whose size is known and whose pixels are not decoded yet."""

    path: str
    width: int  # upright, pixels
    height: int
    kind: str  # format and Pillow's mode, such as 'JPEG RGB'
    decode: Decode
    damage: list[str] = field(default_factory=list)  # errors of a decoder that another one got past
    # The least and the largest value of more than 8 bits, once it is decoded.
    extent: list[float] = field(default_factory=list)

    def pixels(self, shrink: int = 1, rows: int | None = None) -> tuple[np.ndarray, int]:
        """Decode to upright pixels (ceil(height / n), ceil(width / n), 3), uint8. Returns them and n.

        Args:
            shrink: 1, 2, 4 or 8. A JPEG can be shrunk by it while it is decoded, which saves most of the
                time. n is `shrink`, or 1 for an image that can't be shrunk so.
            rows: how many rows from the top are wanted. Rows below may be missing, because a JPEG is not
                decoded any further.

        Raises:
            BadImageError: the file is damaged.
        """
        try:
            return self.decode(shrink, self.height if rows is None else rows)
        except MemoryError:
            raise
        except Exception as error:
            # Pillow's decoders raise nearly every kind of exception on broken files.
            raise BadImageError(self.path, error) from None


def parse_picture(path: str, data: bytes, limits: Limits) -> Picture:
    """Read the head of a file's content. Raises BadImageError for content that is no image, or too large."""
    try:
        found = _jpeg(path, data, limits.max_pixels) if data.startswith(b"\xff\xd8\xff") else None
        return found or _general(path, data, limits)
    except (MemoryError, BadImageError):
        raise
    except Image.DecompressionBombError as error:
        pixels = re.findall(r"\d+", str(error))[0]
        raise BadImageError(path, f"{pixels} pixels, more than data.max_pixels={limits.max_pixels}") from None
    except Exception as error:
        raise BadImageError(path, error) from None


def _check_size(path: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(path, f"{width} x {height} pixels, more than data.max_pixels={max_pixels}")


def read_file(path: str, max_bytes: int) -> bytes:
    """Return the content of a file. Raises BadImageError if it is empty, too large or no regular file."""
    try:
        descriptor = os.open(path, OPENING)
        with io.FileIO(descriptor) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadImageError(path, "not a regular file")
            if status.st_size > max_bytes:
                raise BadImageError(path, f"{status.st_size} bytes, more than data.max_bytes={max_bytes}")
            data = file.read()
    except OSError as error:
        raise UnreadableError(path, error) from None
    if not data:
        raise BadImageError(path, "an empty file")
    return data


def _jpeg(path: str, data: bytes, max_pixels: int) -> Picture | None:
    """Return the picture of a JPEG, or None for a JPEG that simplejpeg does not read as Pillow does."""
    segments = jpeg.read_head(data)
    if jpeg.has_many_scans(data, segments):
        raise BadImageError(path, f"more than {jpeg.MAX_SCANS} scans, each over the whole image")
    try:
        head: tuple[int, int, str, str] = simplejpeg.decode_jpeg_header(data)  # pyright: ignore[reportAssignmentType]
    except (ValueError, KeyError):  # the file is damaged, or simplejpeg has no name for its subsampling
        return None
    height, width, colours, _ = head
    if colours not in ("YCbCr", "Gray"):
        return None
    _check_size(path, width, height, max_pixels)
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
                strict=kept == height,  # the data below the cut would count as an error
            )
        except ValueError as error:
            # The file is damaged. Pillow decides whether enough of it is left.
            damage.append(str(error))
            return upright(_rgb(_open(data)), turned), 1
        return upright(pixels, turned), shrink

    kind = "JPEG L" if colours == "Gray" else "JPEG RGB"
    return Picture(path, *_turned_size(width, height, turned), kind, decode, damage)


def _general(path: str, data: bytes, limits: Limits) -> Picture:
    # Pillow asks for memory by the size in a file's head before it says that size, but never for more than
    # twice this limit. It is put back, because others in this process use Pillow too. Its own limit would
    # overrule a higher data.max_pixels.
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limits.max_pixels
    try:
        image = _open(data)
    finally:
        Image.MAX_IMAGE_PIXELS = before
    return picture_of(path, image, limits)


def picture_of(path: str, image: Image.Image, limits: Limits) -> Picture:
    """Return the picture of a Pillow image. Raises BadImageError for one that is too large or damaged."""
    # This comes first, because Pillow decodes a PNG for metadata.
    _check_size(path, *image.size, limits.max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A tile may be larger than the image, and is unpacked as a whole.
        width, length = (image.tag_v2.get(tag, 0) for tag in (TILE_WIDTH, TILE_LENGTH))
        _check_size(f"{path}: a tile", int(width), int(length), limits.max_pixels)
    # Asked for now, because Pillow forgets it once the pixels are decoded.
    tiles = image.tile if isinstance(image, ImageFile.ImageFile) else []
    cut = image.mode[:1] not in ("I", "F") and any(";16" in str(tile[3]) for tile in tiles)
    turned = _orientation(image)
    extent: list[float] = []

    def decode(shrink: int, rows: int) -> tuple[np.ndarray, int]:
        if cut and limits.value_range is not None:
            raise ValueError("16 bits a colour, of which Pillow gives 8: data.value_range can't be applied")
        return upright(_rgb(image, limits.value_range, extent), turned), 1

    kind = f"{image.format or 'pixels'} {image.mode}"
    return Picture(path, *_turned_size(*image.size, turned), kind, decode, extent=extent)


def _turned_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    return (height, width) if orientation > 4 else (width, height)


def _open(data: bytes) -> ImageFile.ImageFile:
    with warnings.catch_warnings():
        # Pillow warns about odd metadata in each file, but only the pixels matter.
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8. It is 1 if there is none or the metadata is damaged."""
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
    """Turn pixels (H, W, 3) upright, from EXIF's orientation 1 to 8."""
    if orientation == 1:
        return pixels
    if orientation > 4:
        pixels = pixels.transpose(1, 0, 2)
    # After the transposition these orientations are mirrored left to right, and then top to bottom.
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels.copy()  # torch takes no negative strides, not even along an axis of one pixel


def _rgb(
    image: Image.Image, value_range: tuple[float, float] | None = None, extent: list[float] | None = None
) -> np.ndarray:
    """Decode the first frame to (H, W, 3) uint8. Alpha is dropped, as in timm and torchvision.

    Values of more than 8 bits are scaled by `value_range`, and what they span is put into `extent`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if image.mode.startswith("I") or image.mode == "F":
            image = Image.fromarray(_eight_bits(image, value_range, [] if extent is None else extent))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))  # a copy, because Pillow's own array is read-only


def _eight_bits(
    image: Image.Image, value_range: tuple[float, float] | None, extent: list[float]
) -> np.ndarray:
    """Scale grey values of more than 8 bits to uint8. Pillow's own conversion would clip them at 255.

    All images of a data set have one scale: `value_range`, or else 0..65535, or 0..1 for floats, which no
    value may leave. Raises ValueError where one does.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = value_range or (0.0, 1.0 if image.mode == "F" else 65535.0)
    extent[:] = float(values.min()), float(values.max())
    if value_range is None and (extent[0] < low or extent[1] > high):
        raise ValueError(
            f"values from {extent[0]:g} to {extent[1]:g}, beyond {low:g}..{high:g}: set data.value_range, "
            "which deepvit-data check finds"
        )
    # In the second order of operations `high` becomes 255 exactly; the first is that of former versions.
    scaled = values * (255.0 / high) if value_range is None else (values - low) * 255.0 / (high - low)
    return scaled.clip(0, 255).astype(np.uint8)
