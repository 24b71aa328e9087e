"""Read the head of a JPEG file, and change it so that a decoder stops early."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

END_OF_IMAGE = 0xD9
SEQUENTIAL = (0xC0, 0xC1)  # markers of frames that are Huffman-coded and not progressive
START_OF_SCAN = 0xDA
APP1 = 0xE1
RESTARTS = range(0xD0, 0xD8)
WITHOUT_LENGTH = (0x01, *RESTARTS)  # markers without a segment

# The most scans of an image. Photographs have about ten; libtiff and libjpeg-turbo's fuzzers have the same
# limit. A scan of a few bytes can cost as much time as the whole image.
MAX_SCANS = 100
MAX_SEGMENTS = 10_000  # looked at in the search for scans

SCAN = START_OF_SCAN << 8 | 0xFF  # its marker as a number of two bytes
# The next marker in coded data, where 0xFF 0x00 is a byte and restart markers may stand.
MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")


class Head(NamedTuple):
    """What the segments before the first scan tell. Places are counted in bytes."""

    metadata: bool  # whether there is an APP1 segment, which may hold an orientation
    frame: int  # place of the header of a sequential frame; 0: there is none
    scan: int  # place of the first scan; 0: there is none


def read_head(data: bytes) -> Head:
    """Read the segments of a JPEG up to its first scan."""
    metadata, frame, place = False, 0, 2
    while data[place : place + 1] == b"\xff" and place + 1 < len(data):
        marker = data[place + 1]
        if marker == START_OF_SCAN:
            return Head(metadata, frame, place)
        if marker == 0:  # no marker at all, and a decoder looks for the next one
            break
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in WITHOUT_LENGTH:
            place += 2
            continue
        if marker == APP1:
            metadata = True
        elif marker in SEQUENTIAL:
            frame = place
        place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
    return Head(metadata, frame, 0)


def has_many_scans(data: bytes, head: Head) -> bool:
    """Return whether a JPEG has more than MAX_SCANS scans, or so many segments that nobody can tell."""
    scan, frame = head.scan + 4, head.frame + 9  # where each tells its number of colours
    if head.scan and head.frame and data[scan : scan + 1] == data[frame : frame + 1]:
        return False  # a sequential scan of all colours is the only one that is decoded
    # Other data may hold these bytes too: a preview, a film behind the image. Only then is it looked closer.
    starts = (head.scan, head.scan + 1)
    pairs = (np.frombuffer(data, "<u2", (len(data) - start) // 2, start) for start in starts)
    if sum(np.count_nonzero(pair == SCAN) for pair in pairs) <= MAX_SCANS:
        return False
    scans, place = 0, head.scan or 2
    for _ in range(MAX_SEGMENTS):
        found = MARKER.search(data, place)
        if found is None or found[1][0] == END_OF_IMAGE:
            return False
        scans += found[1][0] == START_OF_SCAN
        if scans > MAX_SCANS:
            return True
        place = found.end()
        if found[1][0] not in WITHOUT_LENGTH:
            place += max(2, int.from_bytes(data[place : place + 2], "big"))
    return True


def cut_below(data: bytes, head: Head, rows: int, height: int) -> tuple[bytes, int]:
    """Lower the height in the head of a JPEG, so that a decoder stops a little below the first `rows` rows.

    A scan of all colours codes an image from the top, so those rows are decoded as before. The file is not
    changed if its scans are of another kind, or if it is damaged: then a decoder has to see all of it.

    Args:
        data: the content of the file.
        head: what `read_head` found in it.
        rows: rows from the top that are wanted.
        height: all rows of the image.

    Returns:
        The content, and the height in its head. If that is less than `height`, the decoder will report the
        data that are left over.
    """
    _, frame, scan = head
    if rows >= height or not (frame and scan):
        return data, height
    components = data[frame + 9]
    if data[scan + 4] != components:
        return data, height
    block = 8 * max(data[frame + 11 + 3 * number] & 15 for number in range(components))
    # One more row of blocks is needed, because colours are interpolated from above and below.
    kept = (-(-rows // block) + 1) * block
    if kept >= height or not _one_whole_scan(data, scan):
        return data, height
    return data[: frame + 5] + kept.to_bytes(2, "big") + data[frame + 7 :], kept


def _one_whole_scan(data: bytes, scan: int) -> bool:
    """Return whether only restart markers follow the head of a scan, and then the end of the image.

    A decoder stops at any other marker. Through other damage it guesses its way.
    """
    coded = np.frombuffer(data, np.uint8)[scan + 2 :]
    follows = coded[1:][coded[:-1] == 0xFF]
    if not len(follows) or data[-2:] != bytes([0xFF, END_OF_IMAGE]):
        return False
    inner = follows[:-1]
    return bool(((inner == 0) | (inner == 0xFF) | ((inner & 0xF8) == RESTARTS.start)).all())
