"""The head of a JPEG file: whether it has metadata, and how far it is to be decoded."""

from __future__ import annotations

from collections.abc import Iterator

START_OF_SCAN = b"\xff\xda"
END_OF_IMAGE = b"\xff\xd9"
SEQUENTIAL = (0xC0, 0xC1)  # markers of frames that are Huffman-coded and not progressive
APP1 = 0xE1


def has_metadata(data: bytes) -> bool:
    """Whether there is an APP1 segment, where an orientation would be."""
    return any(marker == APP1 for marker, _ in _segments(data))


def cut_below(data: bytes, rows: int, height: int) -> tuple[bytes, int]:
    """The file made to say that it ends below so many of its rows, so that a decoder stops there.

    One scan codes an image from the top, so the rows above come out as they would. Where that may not hold,
    and where the end of the file is missing, which is to be noticed, the file stays as it is.

    Returns the file, and the height that it has now. The decoder will complain of data left over.
    """
    if rows < height and data.endswith(END_OF_IMAGE) and data.count(START_OF_SCAN) == 1:
        for marker, place in _segments(data):
            if marker in SEQUENTIAL:
                components = data[place + 9]
                block = 8 * max(data[place + 11 + 3 * number] & 15 for number in range(components))
                # A row of blocks more: colours are interpolated from above and below.
                kept = (-(-rows // block) + 1) * block
                if kept < height:
                    return data[: place + 5] + kept.to_bytes(2, "big") + data[place + 7 :], kept
    return data, height


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The markers before the scan, and where each begins."""
    place = 2
    while data[place : place + 1] == b"\xff" and data[place : place + 2] not in (START_OF_SCAN, b"\xff"):
        if data[place + 1] == 0xFF:  # padding
            place += 1
            continue
        yield data[place + 1], place
        place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
