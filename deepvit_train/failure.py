"""Errors of torch and of the system that a user can do something about, in the words of this program."""

from __future__ import annotations

import errno

from deepvit_train.error import OutputError, UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def explain(error: Exception) -> UserError | None:
    """What an error means to the user, or None where it is a fault of the program."""
    text = (str(error) or type(error).__name__).strip()
    first_line = text.splitlines()[0]
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return UserError(
            f"out of memory ({first_line})\n"
            "try a lower trainer.batch_size or a higher trainer.accumulate, trainer.precision=bf16, or "
            "trainer.grad_checkpointing=true"
        )
    if isinstance(error, OSError):
        return _explain_system(error, first_line)
    if not isinstance(error, RuntimeError):
        return None
    if "Bus error" in text or "shared memory" in text:
        return UserError(
            f"a loader process has no room in shared memory ({first_line})\n"
            "make /dev/shm larger (docker run --shm-size=8g), or lower data.workers"
        )
    if "Too many open files" in text:
        return _too_many_files(first_line)
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


def _explain_system(error: OSError, first_line: str) -> UserError | None:
    if error.errno == errno.ENOMEM:
        return UserError(
            f"out of memory ({first_line})\n"
            "loaders need less with a lower data.workers, trainer.batch_size or trainer.eval_batch_size"
        )
    if error.errno == errno.EMFILE:
        return _too_many_files(first_line)
    if error.errno in FULL:
        return OutputError(f"{error.filename or 'a file of the run'}: can't be written ({error.strerror})")
    return None


def _too_many_files(first_line: str) -> UserError:
    return UserError(
        f"too many open files ({first_line})\nraise the limit (ulimit -n 65536) or lower data.workers"
    )


def _lost_a_rank(text: str) -> bool:
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Watchdog caught")
    return any(sign in text for sign in signs)
