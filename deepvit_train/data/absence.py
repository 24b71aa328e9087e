"""Is one image gone, or the whole data set? A share that is unmounted for a moment costs a run no image."""

from __future__ import annotations

import errno
import os
import sys

from deepvit_train.data.decode import BadImageError, UnreadableError
from deepvit_train.data.index import ImageIndex

# What the system says when a disk or a server does not answer. It is no fault of a file.
TRANSPORT_ERRORS = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
    errno.ENODEV,
    errno.ENXIO,
    errno.ENOLINK,
}

PAUSES_S = (0.0, 0.2)  # before each new try to read a file that a data set lacks


def is_gone(index: ImageIndex, image: int, error: UnreadableError) -> bool:
    """Return whether an image can't be read because the data set is gone.

    That is so if the folder of the split is missing, empty or not to be listed, if a tar file is missing, or
    if a link on the way to the image leads nowhere. Where a disk or a server does not answer, it is so unless
    another image can be read.
    """
    file, folder = index.file(image), str(index.folder)
    if is_lost(folder) or _is_behind_a_dead_link(file, folder):
        return True
    if index.tars is not None and not os.path.exists(file):  # noqa: PTH110 - Path's raises if it may not look
        return True
    return error.number in TRANSPORT_ERRORS and not _another_can_be_read(index, image)


def is_lost(folder: str) -> bool:
    """Return whether a folder is missing, empty or not to be listed."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _is_behind_a_dead_link(file: str, folder: str) -> bool:
    """Return whether a folder between the split's and the file is a link to nothing."""
    above = os.path.dirname(file)  # noqa: PTH120 - a text, as all paths of an index
    while len(above) > len(folder):
        if os.path.islink(above) and not os.path.exists(above):  # noqa: PTH110, PTH114 - as above
            return True
        above = os.path.dirname(above)  # noqa: PTH120
    return False


def _another_can_be_read(index: ImageIndex, image: int) -> bool:
    """Try the images a third of the data set further on, and two thirds, which no cache is likely to hold."""
    others = {(image + len(index) * part // 3) % len(index) for part in (1, 2)} - {image}
    for other in sorted(others):
        try:
            index.read_from_disk(other, sys.maxsize)
        except UnreadableError:
            continue
        except BadImageError:
            return True
        return True
    return False
