"""Show what a person sees on a terminal: numbers with their nouns, whole words, rows apart, and bars."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from rich.table import Table

import deepvit_train
from deepvit_train import console
from deepvit_train.console import _EscapingConsole, amount, counted, print_report, wrapped

PACKAGE = Path(deepvit_train.__file__).parent
NOUNS = "threads|images|classes|blocks|steps|ranks|heads|epochs|times|cells|cores|outputs|registers"
# After these words the number counts a whole that is larger than one, or may be, as in '1 of 1 images'.
WHOLE = re.compile(r"(of|of the|of the model's|none of the|at least|x) $")


def test_a_number_goes_with_its_noun() -> None:
    assert [amount(number, "thread") for number in (0, 1, 2, 1234)] == [
        "0 threads",
        "1 thread",
        "2 threads",
        "1,234 threads",
    ]
    assert [amount(number, "epoch") for number in (0.5, 1.0)] == ["0.5 epochs", "1 epoch"]
    assert amount(1, "class", "classes") == "1 class"
    assert amount(2, "class", "classes") == "2 classes"


def test_no_message_puts_a_plural_behind_any_number() -> None:
    """'1 threads' is a fault of one kind, wherever it stands."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for text in ast.walk(ast.parse(file.read_text())):
            if not isinstance(text, ast.JoinedStr):
                continue
            before = ""
            for part, after in zip(text.values, text.values[1:], strict=False):
                if isinstance(part, ast.FormattedValue) and isinstance(after, ast.Constant):
                    plural = re.match(rf" ((training |validation )?({NOUNS}))\b(?!/)", str(after.value))
                    if plural and not WHOLE.search(before):
                        found.append(f"{file.relative_to(PACKAGE)}:{part.lineno}: {plural[1]}")
                before = str(part.value) if isinstance(part, ast.Constant) else ""
    assert not found, "\n".join(found)


def test_lines_break_between_words_and_paths_stay_whole() -> None:
    path = "/data/" + 12 * "folder-of-photographs/" + "last"
    said = wrapped(f"best: step 630, top-1 0.9918, the highest of all evaluations: {path}\nrun folder: a", 40)
    lines = said.split("\n")
    assert [line.split() for line in lines] == [
        ["best:", "step", "630,", "top-1", "0.9918,", "the"],
        ["highest", "of", "all", "evaluations:"],
        [path],
        ["run", "folder:", "a"],
    ]
    assert all(len(line) <= 40 for line in lines if path not in line)


def terminal(width: int) -> tuple[_EscapingConsole, io.StringIO]:
    shown = io.StringIO()
    on = _EscapingConsole(
        file=shown, force_terminal=True, color_system=None, width=width, highlight=False, soft_wrap=True
    )
    return on, shown


@pytest.mark.parametrize(("width", "ruled"), [(60, True), (100, False)])
def test_rows_of_a_table_too_wide_for_the_terminal_are_ruled_off(width: int, ruled: bool) -> None:
    table = Table("class", "what it holds")
    for row in range(3):
        table.add_row(f"row {row}", "a sentence that needs more than sixty columns to be read in one line")
    on, shown = terminal(width)
    on.print(table)
    lines = shown.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert sum(line.startswith("├") for line in lines) == (2 if ruled else 0)


def test_a_command_to_be_copied_stays_whole() -> None:
    on, shown = terminal(20)
    command = "deepvit-train data=imagefolder data.root=/data/digits"
    on.print(command, soft_wrap=True)
    assert shown.getvalue() == f"{command}\n"


def test_a_report_is_a_line_of_json_where_no_person_reads_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_report({"top1": 0.5, "file": "ä\x1b"})
    assert capsys.readouterr().out == '{"top1": 0.5, "file": "\\u00e4\\u001b"}\n'
    on, shown = terminal(60)
    monkeypatch.setattr(console, "console", on)
    print_report({"top1": 0.5})
    assert shown.getvalue() == capsys.readouterr().out == ""


def test_batches_are_counted_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [1, 2, 3]
    with counted(batches, "evaluation") as piped:
        assert piped is batches
    on, shown = terminal(60)
    monkeypatch.setattr(console, "console", on)
    monkeypatch.setattr(console.progress_bar, "__defaults__", (on, False))
    with counted(batches, "evaluation") as passed:
        assert list(passed) == batches
    assert "evaluation" in shown.getvalue()
    assert "3/3" in shown.getvalue()
    with counted(batches, "evaluation", shown=False) as hidden:  # of another rank than the first
        assert hidden is batches
