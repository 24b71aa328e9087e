"""Make cells with known effects, and find them again in the study's findings, page and figures."""

from __future__ import annotations

import json
from statistics import mean
from typing import Any

import pytest

from deepvit_train.commands.study_figure import draw_findings
from deepvit_train.commands.study_finding import CHANCE, findings
from deepvit_train.commands.study_grid import Cell, cells_of
from deepvit_train.commands.study_page import page
from deepvit_train.config.compose import compose_command
from deepvit_train.config.study import GridConfig

# Points that each arm adds at 24 blocks; at 8 blocks a third of it.
EFFECTS = {
    "plain": 0.0,
    "paper": 3.0,
    "norm_alone": 2.9,
    "theta_alone": -1.0,
    "centred": 3.3,
    "layer_scale": 1.0,
    "sharp": 0.5,
}
GRID: GridConfig = compose_command("study", ["root=x"]).study


def jitter(cell: Cell) -> float:
    """A part of a cell's accuracy that differs by seed and arm, and is known."""
    return 0.02 * ((7 * cell.seed + 3 * len(cell.attn)) % 5)


def points(cell: Cell) -> float:
    return 84 - 0.1 * cell.depth + EFFECTS[cell.attn] * cell.depth / 24 + 0.3 * (cell.seed % 4) + jitter(cell)


def made(seeds: int) -> list[dict[str, Any]]:
    """The search, and the cells of the first seeds. The map swap tells the accuracy, the loss half of it."""
    cells = []
    for cell in cells_of(GRID):
        top1 = points(cell) / 100
        if cell.rate is not None:
            fit = {1e-4: -0.02, 3e-4: -0.01, 1e-3: 0.0, 3e-3: -0.01}[cell.rate]
            cells.append(cell.described | {"status": "done", "top1": top1 + fit, "train_loss": 1.0})
        elif cell.seed < seeds:
            early = {
                "train/loss": -cell.depth,
                "collapse/map_swap": top1,
                "collapse/branch_share": cell.seed % 2,
            }
            accuracy = {"calibrated": {"top1": top1}}
            more = {"status": "done", "rate": 1e-3, "accuracy": accuracy, "early": early}
            cells.append(cell.described | more)
    return cells


def gain(seed: int) -> float:
    a, b, c, d = (points(Cell(arm, depth, 64, seed)) for depth in (24, 8) for arm in ("paper", "plain"))
    return a - b - (c - d)


def test_a_finished_study_finds_what_was_put_in() -> None:
    found = findings(made(8), GRID)
    assert (found["finished"], found["cells"]) == (112, 112)
    primary = found["primary"]
    assert primary["differences"] == pytest.approx([gain(seed) for seed in range(8)], abs=2e-3)
    assert primary["mean"] == pytest.approx(2.0, abs=0.1)
    assert primary["p"] == 2 / 256
    secondary = {row["against"]: row for row in found["secondary"]}
    assert list(secondary) == ["plain", *list(EFFECTS)[2:]]
    assert secondary["plain"]["p_holm"] == pytest.approx(6 * 2 / 256)
    assert secondary["plain"]["mean"] == pytest.approx(3.0, abs=0.1)
    best = found["best_control"]
    assert (best["against"], best["equivalent"]) == ("centred", True)  # by the search
    assert best["mean"] == pytest.approx(-0.3, abs=0.1)
    row = next(row for row in found["accuracy"] if (row["arm"], row["depth"]) == ("sharp", 8))
    expected = [points(Cell("sharp", 8, 64, seed)) for seed in range(8)]
    assert row["mean"] == pytest.approx(mean(expected), abs=1e-3)
    assert {(row["best"], row["at_end"]) for row in found["search"]} == {(1e-3, False)}


def test_cells_of_further_depths_and_arms_do_not_weigh_on_the_measures() -> None:
    """Those that share a folder with the study, such as `study=cpu_32`."""
    cells = made(8)
    further = [cell | {"depth": 32} for cell in cells if cell["attn"] == "paper" and "early" in cell]
    further += [cell | {"attn": "longer"} for cell in cells if cell["attn"] == "plain" and "early" in cell]
    assert str(findings(cells + further, GRID)["measures"]) == str(findings(cells, GRID)["measures"])
    text = page(findings(cells + further[:3], GRID))
    assert "Rows of fewer seeds belong to studies in the same folder that are not finished." in text
    assert "Rows of fewer seeds" not in page(findings(cells, GRID))


def test_the_measure_that_tells_the_accuracy_predicts_and_others_do_not() -> None:
    rows = {row["measure"]: row for row in findings(made(8), GRID)["measures"]}
    swap, share = rows["collapse/map_swap"], rows["collapse/branch_share"]
    assert (swap["cells"], swap["rho"], swap["within_depths"]) == pytest.approx((112, 1, 1))
    assert swap["predicts"]
    assert not share["predicts"]
    assert rows["train/loss"]["within_depths"] != rows["train/loss"]["within_depths"]  # constant: unknown


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_an_unfinished_study_says_so_and_how_much_is_there(seeds: int) -> None:
    cells = made(seeds)
    found = findings(cells, GRID)
    text = page(found)
    assert f"\n**This study is not finished.** {14 * seeds} of 112 cells are in." in text
    assert "\nOf the search for learning rates 56 of 56 cells are in." in text
    assert json.loads(json.dumps(found)) is not None
    assert "rates" in draw_findings(found, cells)
    assert ("| 24 | paper - plain |" in text) == (seeds > 0)


def test_half_a_seed_gives_the_pairs_that_are_there() -> None:
    cells = [cell for cell in made(1) if (cell["attn"], cell["depth"]) != ("plain", 24)]
    found = findings(cells, GRID)
    assert found["primary"] is None
    assert {(row["arm"], row["depth"]) for row in found["against_first"]} == {
        (arm, 8) for arm in list(EFFECTS)[1:]
    }
    assert page(found)


def test_a_training_that_was_not_finite_counts_as_chance() -> None:
    cells = made(8)
    broken = next(cell for cell in cells if cell["name"] == "sharp-d24-w64-s3")
    for key in ("accuracy", "early"):
        del broken[key]
    broken |= {"status": "failed", "exit_code": 5}
    searched = next(cell for cell in cells if cell["name"] == "search-sharp-d24-w64-r0.001-s100")
    del searched["top1"]
    searched |= {"status": "failed", "exit_code": 5}
    found = findings(cells, GRID)
    row = next(row for row in found["accuracy"] if (row["arm"], row["depth"]) == ("sharp", 24))
    assert row["top1"]["3"] == CHANCE
    row = next(row for row in found["search"] if (row["arm"], row["depth"]) == ("sharp", 24))
    assert row["top1"]["0.001"] == 0
    assert row["best"] == 3e-4


def test_page_and_figures_show_every_seed() -> None:
    cells = made(8)
    found = findings(cells, GRID)
    text = page(found)
    assert "\nAll 112 of 112 cells are in." in text
    row = next(line for line in text.splitlines() if line.startswith("| 24 | paper - plain |"))
    assert row.split("|")[-2].split() == [
        f"{points(Cell('paper', 24, 64, seed)) - points(Cell('plain', 24, 64, seed)):+.2f}"
        for seed in range(8)
    ]
    primary = next(line for line in text.splitlines() if line.startswith("| primary"))
    assert primary.split("|")[-2].split() == [f"{gain(seed):+.2f}" for seed in range(8)]
    figures = draw_findings(found, cells)
    assert set(figures) == {"rates", "depths", "differences", "measures"}
    forest = figures["differences"].axes[0]
    assert [label.get_text() for label in forest.get_yticklabels()][-1] == "sharp, 24 blocks"
    dots = [line for line in forest.lines if len(line.get_xdata()) == 8]
    assert len(dots) == 12


def test_one_arm_in_the_folder_of_a_study_of_several_has_no_tests() -> None:
    """As `study=cpu_longer`, which adds an arm to the folder of another study."""
    grid = compose_command("study", ["root=x", "study=cpu_longer"]).study
    alone = [
        cell | {"attn": "plain_longer"} for cell in made(8) if cell["attn"] == "plain" and "early" in cell
    ]
    found = findings(made(8) + alone, grid)
    assert (found["finished"], "primary" in found) == (16, False)
    assert "| 24 | plain_longer |" in page(found)


def test_one_arm_or_one_depth_has_no_tests() -> None:
    grid = compose_command("study", ["root=x", "study.depths=[24]"]).study
    found = findings(made(2), grid)
    assert "primary" not in found
    assert "## Tests" not in page(found)
