"""Enumerate the cells of a study, and say how each is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepvit_train.config.compose import plain
from deepvit_train.config.study import Arm, GridConfig, StudyConfig, arms_of

NOT_FINITE = 5  # the exit code of a training whose loss is not finite
SEARCH = "search-"  # what the names of a search's cells begin with


@dataclass(frozen=True)
class Cell:
    """One model of the study, to be trained with one seed.

    Args:
        attn: the name of its arm.
        rate: the learning rate that a cell of the search tries; None for a cell of the study proper.
    """

    attn: str
    depth: int
    dim: int
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """Return the name of the cell's run."""
        place = f"{self.attn}-d{self.depth:02}-w{self.dim}"
        return (
            f"{place}-s{self.seed}" if self.rate is None else f"{SEARCH}{place}-r{self.rate:g}-s{self.seed}"
        )

    @property
    def place(self) -> tuple[str, int]:
        """Return arm and depth, for which a learning rate is chosen."""
        return self.attn, self.depth

    @property
    def described(self) -> dict[str, Any]:
        """Return what the cell's file must say of it."""
        return {"name": self.name} | {key: value for key, value in asdict(self).items() if value is not None}


def cells_of(grid: GridConfig) -> Iterator[Cell]:
    """Give every cell once. The search comes first; then for each seed all depths, then the widths."""
    yield from searches_of(grid)
    square_arms, series_arms = arms_of(grid.attentions), arms_of(grid.width_attentions)
    for seed in grid.seeds:
        square = [Cell(arm.name, depth, grid.dim, seed) for depth in grid.depths for arm in square_arms]
        series = [Cell(arm.name, grid.width_depth, dim, seed) for dim in grid.widths for arm in series_arms]
        yield from dict.fromkeys([*square, *series])


def searches_of(grid: GridConfig) -> list[Cell]:
    """Return the cells that search for learning rates."""
    return [
        Cell(arm.name, depth, grid.dim, seed, rate)
        for seed in grid.search_seeds
        for depth in grid.depths
        for arm in arms_of(grid.attentions)
        for rate in grid.rates
    ]


def is_search_of(searching: Cell, cell: Cell) -> bool:
    """Return whether one cell helps to find the learning rate of another."""
    return searching.rate is not None and cell.rate is None and searching.place == cell.place


def arm_of(cell: Cell, grid: GridConfig) -> Arm:
    """Return the arm of a cell."""
    arms = [*arms_of(grid.attentions), *arms_of(grid.width_attentions)]
    return next(arm for arm in arms if arm.name == cell.attn)


def best_rate(outcomes: Sequence[dict[str, Any]]) -> float | None:
    """Choose the learning rate with the highest mean accuracy, the lower one of equals.

    Args:
        outcomes: what the cells of one arm and depth found, in full. A training that was not finite counts
            as an accuracy of 0.

    Returns None where a cell is not finished.
    """
    found: dict[float, list[float]] = {}
    for outcome in outcomes:
        if outcome.get("status") == "done":
            found.setdefault(outcome["rate"], []).append(outcome["top1"])
        elif outcome.get("exit_code") == NOT_FINITE:
            found.setdefault(outcome["rate"], []).append(0.0)
        else:
            return None
    means = {rate: sum(values) / len(values) for rate, values in found.items()}
    return max(sorted(means), key=lambda rate: means[rate], default=None)


def commands_of(cell: Cell, config: StudyConfig, rate: float | None = None) -> dict[str, list[str]]:
    """Return the overrides of the cell's commands.

    Args:
        rate: the learning rate that was found for a cell of the study proper; None: that of train=.
    """
    out = Path(config.out).expanduser()
    run_dir, threads = out / "runs" / cell.name, f"threads={config.threads or 'null'}"
    rate = rate if cell.rate is None else cell.rate
    commands = {
        "train": [
            *config.train,
            "data=imagefolder",
            f"data.root={out / ('data' if cell.rate is None else 'search')}",
            *arm_of(cell, config.study).overrides,
            f"model.depth={cell.depth}",
            f"model.dim={cell.dim}",
            *([] if rate is None else [f"optim.lr={rate:g}"]),
            f"seed={cell.seed}",
            f"name={cell.name}",
            f"run_dir={run_dir}",
            f"trainer.{threads}",
        ]
    }
    if cell.rate is None:
        commands["analyze"] = [
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
        ]
    return commands
