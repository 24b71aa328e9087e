"""`deepvit-study` trains and measures a model for every depth, attention, width and seed, and compares them.

OUT/data/               the images that every cell reads
OUT/runs/CELL/          a run of deepvit-train, with analysis/analysis.json of deepvit-analyze
OUT/cells/CELL.json     what the table takes from the cell, or why it failed; CELL.log holds what it printed
OUT/settings.json       the settings that all cells share
OUT/study.json          how many cells are finished, and which failed
OUT/table.md, figures/  the results
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepvit_train.atomic import inside, make_folder, write_text
from deepvit_train.commands.study_cell import STOPS, CellProcesses
from deepvit_train.commands.study_store import read_cell, read_losses, read_settings
from deepvit_train.commands.study_table import figures, table
from deepvit_train.config.compose import compose_command, plain
from deepvit_train.config.study import GridConfig, StudyConfig
from deepvit_train.console import amount, console
from deepvit_train.data.subset import copy_images
from deepvit_train.error import ConfigError, Interrupted, OutputError, UserError
from deepvit_train.reading import read_json
from deepvit_train.report.figure import save
from deepvit_train.run.change import differences


@dataclass(frozen=True)
class Cell:
    """One model of the study, to be trained with one seed."""

    attn: str
    depth: int
    dim: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the cell's run."""
        return f"{self.attn}-d{self.depth:02}-w{self.dim}-s{self.seed}"


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
    for cell in cells:
        commands_of(cell, config)  # raises an error about the configuration before hours of training
    try:
        settings = _settings(config, out / "settings.json")
        counts = {"train": config.train_images, "val": config.val_images}
        copy_images(Path(config.root).expanduser(), out / "data", counts)
        for name in ("cells", "runs"):
            make_folder(out, name)
        write_text(out / "settings.json", json.dumps(settings, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"out={out}: can't be written ({error.strerror})") from None

    with CellProcesses(out) as processes:
        due = [cell for cell in cells if _stored(out, cell).get("status") != "done"]
        console.print(f"{amount(len(cells), 'cell')}, {len(cells) - len(due)} finished; folder: {out}")
        for number, cell in enumerate(due[: config.limit_cells], start=1):
            if processes.stop:
                raise Interrupted("stopped between two cells; the same command goes on", processes.stop)
            console.print(f"cell {number} of {len(due)}: {cell.name}")
            inside(out, "runs", cell.name)
            outcome = _run_cell(cell, config, out, processes)
            write_text(out / "cells" / f"{cell.name}.json", json.dumps(outcome, indent=1) + "\n")
            console.print(f"  {outcome['status']} in {outcome['seconds']:.0f} s {outcome.get('error', '')}")
    result = _summarise(cells, config, out)
    if failed := result["failed"]:
        raise _failure(failed, [_stored(out, cell) for cell in cells])
    return result


def _settings(config: StudyConfig, file: Path) -> dict[str, Any]:
    """Return the settings that all cells share. Raises ConfigError if the study in the file has others."""
    common = ("train", "root", "train_images", "val_images", "collapse")
    settings = {key: value for key, value in plain(config).items() if key in common}
    before = read_settings(file)
    if before is not None and (changes := differences(before, settings)):
        told = "; ".join(changes.values())
        raise ConfigError(f"{file.parent} holds a study with {told}; choose another out=")
    return settings


def cells_of(grid: GridConfig) -> Iterator[Cell]:
    """Give every cell once. For each seed all depths come first, then the series over widths."""
    for seed in grid.seeds:
        square = [Cell(attn, depth, grid.dim, seed) for depth in grid.depths for attn in grid.attentions]
        series = [
            Cell(attn, grid.width_depth, dim, seed) for dim in grid.widths for attn in grid.width_attentions
        ]
        yield from dict.fromkeys([*square, *series])


def commands_of(cell: Cell, config: StudyConfig) -> dict[str, list[str]]:
    """Return the overrides of the cell's two commands. Raises ConfigError if they are not valid."""
    out = Path(config.out).expanduser()
    run_dir, threads = out / "runs" / cell.name, f"threads={config.threads or 'null'}"
    commands = {
        "train": [
            *config.train,
            "data=imagefolder",
            f"data.root={out / 'data'}",
            f"attn={cell.attn}",
            f"model.depth={cell.depth}",
            f"model.dim={cell.dim}",
            f"seed={cell.seed}",
            f"name={cell.name}",
            f"run_dir={run_dir}",
            f"trainer.{threads}",
        ],
        "analyze": [
            f"checkpoint={run_dir / 'checkpoints' / 'last'}",
            f"out={run_dir / 'analysis'}",
            "accuracy=true",
            "report=false",
            f"batch_size={config.batch_size}",
            threads,
            *[
                f"collapse.{key}={'null' if value is None else value}"
                for key, value in plain(config.collapse).items()
            ],
        ],
    }
    for command, overrides in commands.items():
        compose_command(command, overrides)
    return commands


def _run_cell(cell: Cell, config: StudyConfig, out: Path, processes: CellProcesses) -> dict[str, Any]:
    """Train and analyse a cell in a process of its own, so that even a crash stops no other cell.

    Raises Interrupted if a stop signal ended it.
    """
    commands, log = commands_of(cell, config), out / "cells" / f"{cell.name}.log"
    began = time.perf_counter()
    code = processes.run(commands, log)
    outcome = {"name": cell.name, "attn": cell.attn, "depth": cell.depth, "dim": cell.dim, "seed": cell.seed}
    outcome |= {"seconds": round(time.perf_counter() - began, 1), "train": commands["train"]}
    stop = processes.stop if code and processes.stop else code - 128
    if stop in STOPS:
        raise Interrupted(f"cell {cell.name} was stopped; the same command continues it", stop)
    if code:
        said = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        error = f"exit code {code}: {said[-1] if said else log}"
        return outcome | {"status": "failed", "exit_code": code, "error": error}
    return outcome | {"status": "done", **_result(out / "runs" / cell.name)}


def _result(run: Path) -> dict[str, Any]:
    """Read what the table and the figures need from a finished cell."""
    analysis = read_json(run / "analysis" / "analysis.json")["models"][0]
    states = {state: _compact(analysis[state]) for state in ("trained", "untrained")}
    return {"accuracy": analysis["accuracy"], "train_loss": read_losses(run)[-1], **states}


def _compact(measured: dict[str, Any]) -> dict[str, Any]:
    """Reduce a measurement to its similar blocks and to one number for each measure and block."""
    by_block: dict[str, Any] = {}
    for name, values in measured["averages"].items():
        if name.startswith("similarity/"):
            by_block[name] = [None, *[row[block] for block, row in enumerate(values[1:])]]
        elif name == "features":
            by_block[name] = [row[-1] for row in values]
        elif name == "map_swap" or name.startswith("vectors/"):
            by_block[name] = [None, *values]  # the first block has none before it
        elif isinstance(values, list) and isinstance(values[0], list):
            by_block[name] = [sum(heads) / len(heads) for heads in values]
        else:
            by_block[name] = values
    return {"similar_blocks": measured["similar_blocks"], "by_block": by_block}


def _summarise(cells: list[Cell], config: StudyConfig, out: Path) -> dict[str, Any]:
    stored = [found for cell in cells if (found := _stored(out, cell))]
    done = [found for found in stored if found["status"] == "done"]
    failed = {found["name"]: found["error"] for found in stored if found["status"] != "done"}
    result = {"config": plain(config), "finished": len(done), "cells": len(cells), "failed": failed}
    write_text(out / "study.json", json.dumps(result, indent=1) + "\n")
    if done:
        write_text(out / "table.md", table(done))
        make_folder(out, "figures")
        for name, figure in figures(done, config.study, config.collapse).items():
            save(figure, out / "figures", name)
        console.print(table(done))
    written = f"; written: {out / 'table.md'}, {out / 'figures'}" if done else ""
    console.print(f"{len(done)} of {len(cells)} cells finished{written}")
    for name, error in failed.items():
        console.print(f"failed: {name}: {error}")
    return result


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
    return read_cell(out / "cells", {"name": cell.name, **asdict(cell)})
