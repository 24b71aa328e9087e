"""What the terminal shows: lines, tables and a progress bar. A failing terminal ends nothing.

All that a process prints passes through here, so that a name in a file can't steer the terminal. This module
imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Any, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

T = TypeVar("T")
# What steers a terminal (C0, DEL and C1, but tab and line feed), turns the order of letters around, breaks a
# line without a line feed, or is no character (surrogates: bytes of a file name that are not UTF-8).
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)
# The reader of a pipe ended (`deepvit-train --help | head -3`), or the terminal was closed.
READER_LEFT = {errno.EPIPE, errno.EIO}


def printable(text: str) -> str:
    r"""Return text with an escape, such as `\x1b`, in place of each character that steers a terminal."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(name: str) -> str:
    r"""Return a name out of a file as `printable` does, with line feeds and tabs escaped too."""
    return printable(name).replace("\n", r"\n").replace("\t", r"\t")


def wrapped(text: str, width: int) -> str:
    """Return text whose lines break between words. A path stays whole, to be copied."""
    lines = [
        textwrap.wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    ]
    return "\n".join("\n".join(line) for line in lines)


def amount(number: float, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: '1 thread', '2 threads', '1,234 images'."""
    digits = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{digits} {noun if number == 1 else plural or f'{noun}s'}"


def first_of(names: Sequence[str], most: int) -> str:
    """Return the first names of a list: 'a, b, ... 3 more'."""
    more = f", ... {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


class OutlivingStream:
    """A text stream that never fails. After the first text that can't be written it goes on into nothing.

    Attributes:
        lost: the error that ended it, if there was one. That a reader left is none: it wanted no more.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        """Write text. Returns its length."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: somebody closed the stream
            self._silence(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is held back."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._silence(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _silence(self, error: Exception) -> None:
        if isinstance(error, BlockingIOError):
            return  # another program made the terminal non-blocking: this text is lost, the next may not be
        if not isinstance(error, OSError) or error.errno not in READER_LEFT:
            self.lost = self.lost or error
        # Child processes and libraries write to the same descriptor.
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)


class EscapingStream:
    """A stream for texts that hold names out of files: it escapes what steers a terminal.

    Attributes:
        rich_proxied_file: the stream under it. rich looks for it by this name, and writes its own control
            codes there.
    """

    def __init__(self, stream: OutlivingStream) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write text, escaped. Returns its length."""
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def protect_streams() -> None:
    """Let stdout and stderr of this process outlive their readers, and escape what is written to them.

    Streams that stand in for them are left alone.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`: the next file that is opened would get its number, and its text
            stream = _open_nothing(number)
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        if name != "stdin" and stream is getattr(sys, f"__{name}__"):
            # The locale may lack letters of a name.
            cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")
            setattr(sys, name, EscapingStream(OutlivingStream(stream)))


def tell_error(error: Exception) -> None:
    """Print an error that a user can mend, or that a run was stopped, to stderr."""
    line = f"{getattr(error, 'title', 'error: ')}{printable(str(error))}"
    with suppress(OSError, ValueError):  # a closed stream is asked whether it is a terminal
        if sys.stderr.isatty():
            line = wrapped(line, shutil.get_terminal_size().columns)
    print(line, file=sys.stderr)


def lost_output() -> Exception | None:
    """Return the error that stdout ended with, if texts were lost that a reader still waits for."""
    sys.stdout.flush()
    return getattr(sys.stdout, "lost", None)


def _open_nothing(number: int) -> TextIO:
    """Return a stream without content, under a descriptor's number if that is free."""
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, and those below are taken
        os.set_inheritable(number, True)
    return open(os.devnull, "r+")  # noqa: PTH123 - as long as the process lives


class _EscapingConsole(Console):
    """A console that escapes every string that it is given, in a table too, before it measures it.

    On a terminal lines break between words, and the rows of a table that is too wide are ruled off.
    """

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print as rich does. With soft_wrap=True a line stays whole, as a command to be copied must."""
        if self.is_terminal and soft_wrap is None:
            objects = tuple(
                wrapped(printable(each), self.width) if isinstance(each, str) else each for each in objects
            )
            for table in (each for each in objects if isinstance(each, Table)):
                soft_wrap = False  # its cells may break
                if self.measure(table, options=self.options.update(width=10_000)).maximum > self.width:
                    table.show_lines = True
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


# Paths and figures are printed as they are: no markup, no colouring, no break inside a word to be copied.
# A notebook gets the same lines as a file, because rich would show each as HTML of its own there.
PLAIN: Any = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True, "force_jupyter": False}
console = _EscapingConsole(**PLAIN)
if not console.is_terminal:
    console.width = 200  # a file or a pipe has no width: no table is squeezed into 80 columns
# What is said beside a result that goes to stdout itself.
notes = _EscapingConsole(stderr=True, **PLAIN)


def print_report(report: dict[str, Any]) -> None:
    """Print what a command found as one line of JSON for programs, if stdout is no terminal."""
    if not console.is_terminal:
        print(json.dumps(report), flush=True)


@contextmanager
def counted(batches: Iterable[T], title: str, shown: bool = True) -> Iterator[Iterable[T]]:
    """Give the same batches, with a bar on the terminal that counts them, and that goes when they end."""
    if not (shown and console.is_terminal):
        yield batches
        return
    with progress_bar(transient=True) as bar:
        yield bar.track(batches, description=title)


def progress_bar(on: Console = console, transient: bool = False) -> Progress:
    """Return a bar that shows steps done, time taken and time left. Only a terminal shows it.

    Args:
        transient: remove the bar at its end.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=on,
        disable=not on.is_terminal,
        transient=transient,
        # rich would take prints over, and read control codes in them.
        redirect_stdout=False,
        redirect_stderr=False,
    )
