"""Read what a study's folder holds: its settings, its cells, and what a cell's run left behind.

The folder may come from a stranger, so everything is checked before it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepvit_train.commands.study_grid import NOT_FINITE, SEARCH
from deepvit_train.error import CheckpointError
from deepvit_train.reading import read_json, read_json_lines
from deepvit_train.run import schema
from deepvit_train.run.schema import fitting


def read_settings(file: Path) -> dict[str, Any] | None:
    """Return the settings that all cells share, or None where none are stored. Raises CheckpointError."""
    return _read(file, schema.CONFIG)


def read_cell(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a cell, or nothing where none is stored.

    Args:
        folder: the study's folder of cells.
        expected: the name, attn, depth, dim and seed of the cell, and the rate if it belongs to a search.

    Raises CheckpointError for an outcome that can't be used, or is another cell's.
    """
    file = folder / f"{expected['name']}.json"
    found = _read(file, {"status": schema.TEXT})
    if found is None:
        return {}
    done = schema.SEARCH_CELL if "rate" in expected else schema.DONE_CELL
    fitting(found, done if found["status"] == "done" else schema.FAILED_CELL, file)
    for key, value in expected.items():
        if found.get(key) != value:
            raise CheckpointError(f"{file}: is about another cell ({key}={found.get(key)!a}, not {value})")
    lengths = set() if "rate" in expected else {len(each) for each in _by_block(found)}
    if lengths - {expected["depth"]}:
        raise CheckpointError(f"{file}: damaged (not a value for each of {expected['depth']} blocks)")
    return found


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Return all cells of a folder, of any grid, that are finished or were not finite, by name.

    Raises CheckpointError for one that can't be used.
    """
    cells = []
    for file in sorted(folder.glob("*.json")):
        found = _read(file, {"name": schema.TEXT, "status": schema.TEXT}) or {}
        done, searched = found["status"] == "done", found["name"].startswith(SEARCH)
        if done:
            fitting(found, schema.SEARCH_CELL if searched else schema.DONE_CELL, file)
        elif found.get("exit_code") == NOT_FINITE:
            fitting(found, schema.PLACE | ({"rate": schema.POSITIVE} if searched else {}), file)
        if done or found.get("exit_code") == NOT_FINITE:
            cells.append(found)
    return cells


def read_lines(run: Path) -> list[dict[str, Any]]:
    """Return the scalars that a run logged, line by line, each with its step. Raises CheckpointError."""
    file = run / "metrics.jsonl"
    try:
        lines = [content for _, content in read_json_lines(file) if isinstance(content, dict)]
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror})") from None
    return [line for line in lines if schema.COUNT.fits(line.get("step"))]


def _by_block(cell: dict[str, Any]) -> list[list[float]]:
    """Return the lists with a value for each block that the figures show."""
    states = ("trained", "untrained") if cell["status"] == "done" else ()
    return [cell[state]["by_block"][name] for state in states for name in schema.MEASURED["by_block"]]


def _read(file: Path, shape: Any) -> dict[str, Any] | None:
    """Return the content of a file that fits a shape, or None where there is no file."""
    try:
        return fitting(read_json(file), shape, file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror})") from None
