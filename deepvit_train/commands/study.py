"""`deepvit-study` trains and measures a model for every depth, arm, width and seed, and compares them.

OUT/data/               the images that every cell reads
OUT/search/             the images of the search for learning rates, if there is one
OUT/runs/CELL/          a run of deepvit-train, with analysis/analysis.json of deepvit-analyze
OUT/cells/CELL.json     what is compared of the cell, or why it failed; CELL.log holds what it printed
OUT/times/CELL.json     how long it took
OUT/settings.json       the settings that all cells share
OUT/study.json          how many cells are finished, and which failed
OUT/table.md, figures/  means over seeds, and the paper's figures
OUT/findings.md, .json  differences of pairs, tests, and which measure predicts
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepvit_train.atomic import inside, make_folder, write_text
from deepvit_train.commands.study_cell import STOPS, CellProcesses
from deepvit_train.commands.study_figure import draw_findings
from deepvit_train.commands.study_finding import findings
from deepvit_train.commands.study_grid import (
    Cell,
    arm_of,
    best_rate,
    cells_of,
    commands_of,
    is_search_of,
    searches_of,
)
from deepvit_train.commands.study_page import page
from deepvit_train.commands.study_result import found_in
from deepvit_train.commands.study_store import read_cell, read_cells, read_settings
from deepvit_train.commands.study_table import figures, table
from deepvit_train.config.compose import compose_command, plain
from deepvit_train.config.study import StudyConfig
from deepvit_train.console import amount, console
from deepvit_train.data.subset import copy_images, hold_out
from deepvit_train.distributed.world import check_device
from deepvit_train.error import ConfigError, Interrupted, OutputError, UserError
from deepvit_train.report.figure import save
from deepvit_train.run.change import differences


def run(config: StudyConfig) -> dict[str, Any]:
    """Train and measure the cells that are not finished yet. A cell that fails does not stop the others.

    Raises:
        ConfigError, DataError: the configuration or the images can't be used.
        OutputError: the folder can't be written, or another study writes there.
        Interrupted: a stop signal came, and the cell has saved; the same command continues it.
        UserError: cells failed. The exit code is that of the first.
    """
    out = Path(config.out).expanduser()
    cells = list(cells_of(config.study))
    _check(cells, config)
    try:
        settings = _settings(config, out / "settings.json")
        root, counts = (
            Path(config.root).expanduser(),
            {"train": config.train_images, "val": config.val_images},
        )
        copy_images(root, out / "data", counts)
        if config.study.rates:
            assert config.search_images is not None
            assert config.train_images is not None
            hold_out(root, out / "search", out / "data" / "train", config.train_images, config.search_images)
        for name in ("cells", "runs", "times"):
            make_folder(out, name)
        write_text(out / "settings.json", json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"out={out}: can't be written ({error.strerror})") from None

    with CellProcesses(out) as processes:
        due = [cell for cell in cells if _stored(out, cell).get("status") != "done"]
        console.print(f"{amount(len(cells), 'cell')}, {len(cells) - len(due)} finished; folder: {out}")
        _train(due, config, out, processes)
    result = _summarise(cells, config, out)
    if failed := result["failed"]:
        raise _failure(failed, [_stored(out, cell) for cell in cells])
    return result


def _check(cells: list[Cell], config: StudyConfig) -> None:
    """Raise an error about the configuration of any cell before hours of training.

    Of cells that differ in their seed or rate alone, one is looked at.
    """
    rate = min(config.study.rates, default=None)
    for cell in {(*cell.place, cell.dim, cell.rate is None): cell for cell in cells}.values():
        commands = commands_of(cell, config, rate)
        composed = {command: compose_command(command, overrides) for command, overrides in commands.items()}
        if config.limit_cells != 0:
            check_device(composed["train"].trainer.device, "trainer.device")


def _settings(config: StudyConfig, file: Path) -> dict[str, Any]:
    """Return the settings that all cells share. Raises ConfigError if the study in the file has others."""
    common = ("train", "train_images", "val_images", "search_images", "collapse")
    settings = {key: value for key, value in plain(config).items() if key in common}
    if not config.study.rates:
        del settings["search_images"]  # nothing is searched
    before = read_settings(file)
    if before is not None and (changes := differences(before, settings)):
        told = "; ".join(changes.values())
        raise ConfigError(f"{file.parent} holds a study with {told}; choose another out=")
    return settings


@dataclass(frozen=True)
class _Running:
    """A cell that is being trained, what is known of it before, and when it began."""

    cell: Cell
    outcome: dict[str, Any]
    began: float


def _train(due: list[Cell], config: StudyConfig, out: Path, processes: CellProcesses) -> None:
    """Train and analyse cells, each in a process of its own, so that even a crash stops no other cell.

    Raises Interrupted if a stop signal came.
    """
    waiting = deque(enumerate(due[: config.limit_cells], start=1))
    running: dict[str, _Running] = {}
    stopped: list[str] = []
    while running or (waiting and not processes.stop):
        while waiting and not processes.stop and len(running) < config.cells_at_a_time:
            number, cell = waiting[0]
            if any(is_search_of(each.cell, cell) for each in running.values()):
                break
            waiting.popleft()
            console.print(f"cell {number} of {len(due)}: {cell.name}")
            _start(cell, config, out, processes, running)
        if not running:
            continue
        name, code = processes.wait()
        ended = running.pop(name)
        stop = processes.stop if code and processes.stop else code - 128
        if stop in STOPS:
            stopped.append(name)
            processes.pass_on(stop)
        else:
            _finish(ended, code, out)
    if stopped:
        names, one = ", ".join(sorted(stopped)), len(stopped) == 1
        told = f"cell {names} was stopped" if one else f"cells {names} were stopped"
        raise Interrupted(f"{told}; the same command continues {'it' if one else 'them'}", processes.stop)
    if waiting:
        raise Interrupted("stopped between two cells; the same command goes on", processes.stop)


def _start(
    cell: Cell, config: StudyConfig, out: Path, processes: CellProcesses, running: dict[str, _Running]
) -> None:
    """Begin a cell, unless its learning rate is not known."""
    inside(out, "runs", cell.name)
    described = cell.described | {"overrides": list(arm_of(cell, config.study).overrides)}
    begun, rate = _Running(cell, described, time.perf_counter()), None
    if config.study.rates and cell.rate is None:
        tried = [each for each in searches_of(config.study) if is_search_of(each, cell)]
        rate = best_rate([_stored(out, each) for each in tried])
        if rate is None:
            error = "the search for its learning rate is not finished"
            _write(begun, out, {"status": "failed", "exit_code": 1, "error": error})
            return
        begun.outcome["rate"] = rate
    processes.start(cell.name, commands_of(cell, config, rate), _log(out, cell))
    running[cell.name] = begun


def _finish(ended: _Running, code: int, out: Path) -> None:
    """Keep what a cell found, or why it failed."""
    cell = ended.cell
    if code:
        log = _log(out, cell)
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        error = f"exit code {code}: {said[-1] if said else log}"
        _write(ended, out, {"status": "failed", "exit_code": code, "error": error})
    else:
        found = found_in(out / "runs" / cell.name, analysed=cell.rate is None)
        _write(ended, out, {"status": "done", **found})


def _write(ended: _Running, out: Path, found: dict[str, Any]) -> None:
    name, seconds = ended.cell.name, time.perf_counter() - ended.began
    write_text(out / "cells" / f"{name}.json", json.dumps(ended.outcome | found) + "\n")
    write_text(out / "times" / f"{name}.json", json.dumps({"seconds": round(seconds, 1)}) + "\n")
    console.print(f"  {name}: {found['status']} in {seconds:.0f} s {found.get('error', '')}")


def _log(out: Path, cell: Cell) -> Path:
    return out / "cells" / f"{cell.name}.log"


def _summarise(cells: list[Cell], config: StudyConfig, out: Path) -> dict[str, Any]:
    stored = [found for cell in cells if (found := _stored(out, cell))]
    done = [found for found in stored if found["status"] == "done"]
    compared = [found for found in done if "accuracy" in found]
    failed = {found["name"]: found["error"] for found in stored if found["status"] != "done"}
    result = {"config": plain(config), "finished": len(done), "cells": len(cells), "failed": failed}
    write_text(out / "study.json", json.dumps(result, indent=1) + "\n")
    if compared:
        write_text(out / "table.md", table(compared))
        make_folder(out, "figures")
        for name, figure in figures(compared, config.study, config.collapse).items():
            save(figure, out / "figures", name)
        console.print(table(compared))
    _write_findings(config, out)
    written = f"; written: {out / 'table.md'}, {out / 'figures'}" if compared else ""
    console.print(f"{len(done)} of {len(cells)} cells finished{written}")
    for name, error in failed.items():
        console.print(f"failed: {name}: {error}")
    return result


def _write_findings(config: StudyConfig, out: Path) -> None:
    """Write what all cells in the folder say, of this grid and of others."""
    cells = read_cells(out / "cells")
    if not cells:
        return
    found = findings(cells, config.study)
    write_text(out / "findings.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "findings.md", page(found))
    make_folder(out, "figures")
    for name, figure in draw_findings(found, cells).items():
        save(figure, out / "figures", name)


def _failure(failed: dict[str, str], stored: list[dict[str, Any]]) -> UserError:
    """Return the error that ends a study with failed cells. Its exit code is that of the first."""
    name, told = next(iter(failed.items()))
    code = next(cell for cell in stored if cell.get("name") == name).get("exit_code", 1)
    error = UserError(
        f"cells failed: {len(failed)}; the first is {name}: {told}\nthe same command tries them again"
    )
    error.exit_code = code if code < 128 else 1
    return error


def _stored(out: Path, cell: Cell) -> dict[str, Any]:
    return read_cell(out / "cells", cell.described)
