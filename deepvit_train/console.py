"""What the terminal shows: lines, tables and a progress bar. This module imports no torch."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Paths and figures are printed as they are: no markup, no colouring, no wrapping inside a word to be copied.
console = Console(markup=False, highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 200  # a file or a pipe has no width: no table is squeezed into 80 columns
# What is said beside a result that goes to stdout itself.
notes = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def progress_bar(on: Console = console) -> Progress:
    """Return a bar that shows steps done, time taken and time left. Only a terminal shows it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=on,
        disable=not on.is_terminal,
    )
