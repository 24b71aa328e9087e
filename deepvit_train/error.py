"""Errors that a user can cause or mend. Each class is one exit code of the commands.

Errors of torch and of the system are translated by `explain`. This module imports no torch.
"""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What torch.compile raises, by name: this module imports no torch.
COMPILATION = {"TorchDynamoException", "BackendCompilerFailed", "InductorError"}
# A disk, a quota or a file size is exhausted.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# What needs less memory, by where there was too little.
MEMORY_KEYS = {
    "train": (
        "a higher trainer.accumulate or trainer.grad_checkpointing=true, with which a run goes on; in a new "
        "run also a lower trainer.batch_size or trainer.precision=bf16"
    ),
    "evaluation": "a lower trainer.eval_batch_size, with which the run goes on",
    "probe": "a lower collapse.images, or trainer.probe_every_steps=null",
    "eval": "a lower batch_size, or precision=bf16",
    "compare": "a lower batch_size",
    "predict": "a lower batch_size, or precision=bf16",
    "export": "a lower batch_size or check_images",
    "analyze": (
        "a lower batch_size or collapse.images; with accuracy=true a lower eval_batch_size; with "
        "features=true also a lower features_images"
    ),
    "bench": "a lower batch_size, or precision=bf16",
    "data-check": "a lower batch_size, precision=bf16, or timing=false",
}


class UserError(Exception):
    """An error that is shown without a traceback.

    Its message has one or two lines: what is wrong, which value, and the nearest valid one.
    """

    exit_code = 1
    title = "error: "  # what its message begins with


class ConfigError(UserError, ValueError):
    """A key, choice or combination of values that can't be used."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint or weights file that is missing, damaged or does not fit."""

    exit_code = 3


class DataError(UserError):
    """A data folder or an image that can't be used."""

    exit_code = 4


class NotFiniteError(UserError):
    """The loss or the gradient norm became NaN or infinite."""

    exit_code = 5


class OutputError(UserError):
    """The run folder can't be made, locked or written."""

    exit_code = 6


class Collapsed(UserError):
    """In more blocks than collapse.stop_above allows, the attention maps do not matter."""

    exit_code = 7


class Interrupted(UserError):
    """A stop signal arrived, and the state was saved. The exit code is 128 plus the signal's number."""

    title = ""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` with the known word that is most like `word`.

    Returns an empty text where none is near: where more than a third of the letters would have to change, or
    more than three, and neither word begins with the other.
    """
    known = list(known)
    for each in known:
        if looks_like(word, each):
            return f"; did you mean {each!a}? It differs from {word!a} in its Unicode form only"
    ranked = sorted((slips(word, each), place, each) for place, each in enumerate(known))
    near = [each for count, _, each in ranked if count <= min(3, max(len(word), len(each)) // 3)]
    near += [each for _, _, each in ranked if len(word) > 2 and _begins(word, each)]
    return f"; did you mean '{near[0]}'?" if near else ""


def looks_like(word: str, other: str) -> bool:
    """Return whether two different words differ in their Unicode form only, and so look the same."""
    return word != other and unicodedata.normalize("NFKC", word) == unicodedata.normalize("NFKC", other)


def spelled(word: str, others: Iterable[str]) -> str:
    """Return a word as it is shown beside others: with escapes, if one of them looks the same."""
    return ascii(word) if any(looks_like(word, other) for other in others) else word


def slips(word: str, other: str) -> int:
    """Return how many letters were missed, added, changed or swapped with the next. Case does not count."""
    first, second = word.casefold()[:200], other.casefold()[:200]
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, start=1):
        above, row = row, [i]
        for j, its in enumerate(second, start=1):
            changed = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != its))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == its:
                changed = min(changed, before[j - 2] + 1)
            row.append(changed)
        before = above
    return row[-1]


def _begins(word: str, other: str) -> bool:
    shorter, longer = sorted((word.casefold(), other.casefold()), key=len)
    return len(shorter) > 2 and longer.startswith(shorter)


@contextmanager
def explained(stage: str) -> Iterator[None]:
    """Let errors of torch and of the system leave as those of the user. `stage` is as in `explain`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        found = explain(error, stage)
        if found is None:
            raise
        raise found from None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory could not be had, of the machine or of a GPU."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def explain(error: Exception, stage: str) -> UserError | None:
    """Translate an error of torch or of the system for the user. Returns None for a fault of the program.

    Args:
        stage: what was going on, a key of MEMORY_KEYS: a command, or a part of one.
    """
    text = (str(error) or type(error).__name__).strip()
    first_line = text.splitlines()[0]
    keys = MEMORY_KEYS.get(stage, "a smaller batch or model")
    if is_out_of_memory(error):
        return UserError(f"out of memory ({first_line})\ntry {keys}")
    if isinstance(error, OSError):
        return _explain_system(error, first_line, keys)
    if any(kind.__name__ in COMPILATION for kind in type(error).__mro__):
        return UserError(
            f"torch.compile failed ({first_line})\n"
            "it needs a working C++ compiler (g++, or what CXX names) or, on a GPU, Triton; "
            "nearest: trainer.compile=none"
        )
    if not isinstance(error, RuntimeError):
        return None
    if "Bus error" in text or "shared memory" in text:
        return UserError(
            f"a loader process has no room in shared memory ({first_line})\n"
            "make /dev/shm larger (docker run --shm-size=8g), or lower data.workers"
        )
    if "Too many open files" in text:
        return _too_many_files(first_line)
    if "can't start new thread" in text:
        return _too_many_processes(first_line)
    if "deterministic implementation" in text:
        return UserError(f"{first_line}\nnearest: trainer.deterministic=false")
    if "DataLoader worker" in text:
        return UserError(
            f"a loader process died ({first_line})\n"
            "the system may have killed it for memory: lower data.workers; the same command goes on"
        )
    if _lost_a_rank(text):
        return UserError(
            f"another rank died or hangs ({first_line})\n"
            "its own messages say why; the same command goes on from the last checkpoint"
        )
    return None


def _explain_system(error: OSError, first_line: str, keys: str) -> UserError:
    if error.errno == errno.ENOMEM:
        return UserError(
            f"out of memory ({first_line})\nloaders need less with a lower data.workers; else try {keys}"
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return _too_many_files(first_line)
    if error.errno == errno.EAGAIN:
        return _too_many_processes(first_line)
    if error.errno in FULL:
        return OutputError(f"{error.filename or 'a file of the run'}: can't be written ({error.strerror})")
    if isinstance(error, ConnectionError):
        return UserError(
            f"another process of the run was lost ({first_line})\n"
            "the same command goes on from the last checkpoint"
        )
    return UserError(f"the system refused something ({first_line})")


def _too_many_files(first_line: str) -> UserError:
    return UserError(
        f"too many open files ({first_line})\nraise the limit (ulimit -n 65536) or lower data.workers"
    )


def _too_many_processes(first_line: str) -> UserError:
    return UserError(
        f"too many processes or threads ({first_line})\nraise the limit (ulimit -u), or lower data.workers"
    )


def _lost_a_rank(text: str) -> bool:
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Timed out waiting",
        "Watchdog caught",
        "NCCL error",
        "ncclRemoteError",
    )
    return any(sign in text for sign in signs)
