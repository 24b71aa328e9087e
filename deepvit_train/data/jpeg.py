"""The head of a JPEG file: whether it has metadata, and how far it is to be decoded."""

from __future__ import annotations

from collections.abc import Iterator

END_OF_IMAGE = b"\xff\xd9"
SEQUENTIAL = (0xC0, 0xC1)  # markers of frames that are Huffman-coded and not progressive
START_OF_SCAN = 0xDA
APP1 = 0xE1


def has_metadata(data: bytes) -> bool:
    """Whether there is an APP1 segment, where an orientation would be."""
    return any(marker == APP1 for marker, _ in _segments(data))


def cut_below(data: bytes, rows: int, height: int) -> tuple[bytes, int]:
    """The file made to say that it ends below so many of its rows, so that a decoder stops there.

    A scan of all colours codes an image from the top, so the rows above come out as they would. Where that
    may not hold, and where the end of the file is missing, which is to be noticed, the file stays as it is.

    Returns the file, and the height that it has now. The decoder will complain of data left over.
    """
    if rows >= height or not data.endswith(END_OF_IMAGE):
        return data, height
    frame = 0
    for marker, place in _segments(data):
        if marker in SEQUENTIAL:
            frame = place
        elif marker == START_OF_SCAN and frame and data[place + 4] == data[frame + 9]:
            components = data[frame + 9]
            block = 8 * max(data[frame + 11 + 3 * number] & 15 for number in range(components))
            # A row of blocks more: colours are interpolated from above and below.
            kept = (-(-rows // block) + 1) * block
            if kept < height:
                return data[: frame + 5] + kept.to_bytes(2, "big") + data[frame + 7 :], kept
    return data, height


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG up to its first scan, and where each begins."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 1 < len(data):
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        yield marker, place
        if marker == START_OF_SCAN:
            return
        place += 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
