"""Write files whole, in one place, and nowhere where a link leads."""

from __future__ import annotations

import ast
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import deepvit_train
from deepvit_train import atomic
from deepvit_train.atomic import RefusedError
from deepvit_train.error import OutputError
from tests.conftest import Command

PACKAGE = Path(deepvit_train.__file__).parent
WRITERS: dict[str, Callable[[Path], object]] = {
    "write_text": lambda path: atomic.write_text(path, "new"),
    "append": lambda path: atomic.append(path).write("new"),
    "open_lock": lambda path: os.write(atomic.open_lock(path), b"new"),
    "make_folder": lambda path: atomic.make_folder(path.parent, path.name),
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file that nothing may touch, beside the folder `run`."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "outside"
    file.write_text("as it was")
    return file


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", ["../outside", "../absent", ".", "self"])
def test_a_link_is_named_with_where_it_leads_and_not_followed(outside: Path, name: str, there: str) -> None:
    place = outside.parent / "run" / "self"
    place.symlink_to(there)
    with pytest.raises(RefusedError) as error:
        WRITERS[name](place)
    assert str(error.value) == f"{place}: is a link to '{there}'; nothing is written there, so remove it"
    assert error.value.exit_code == 6
    assert outside.read_text() == "as it was"
    assert sorted(path.name for path in outside.parent.rglob("*")) == ["outside", "run", "self"]
    assert place.is_symlink()


@pytest.mark.parametrize("name", ["write_text", "append", "open_lock"])
def test_only_a_regular_file_is_written_to(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for there, told in (("folder", "a folder"), ("pipe", "a named pipe")):
        with pytest.raises(RefusedError, match=f"{there}: is {told}; nothing is written there"):
            WRITERS[name](tmp_path / there)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_file_takes_no_folders_place(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("")
    with pytest.raises(RefusedError, match="tb: is a file"):
        atomic.make_folder(tmp_path, "tb")


def test_a_folder_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    made = atomic.make_folder(tmp_path / "runs" / "one", "checkpoints")
    atomic.write_text(made / "file", "new")
    assert (tmp_path / "disk" / "one" / "checkpoints" / "file").read_text() == "new"


def test_the_name_until_a_file_is_whole_can_not_be_foreseen(tmp_path: Path) -> None:
    names = {atomic.unfinished(tmp_path / "config.yaml").name for _ in range(100)}
    assert len(names) == 100
    assert {len(name) for name in names} == {len(".partial") + 1 + 16}
    (tmp_path / "taken").symlink_to("outside")
    with pytest.raises(FileExistsError):
        atomic.create(tmp_path / "taken")
    assert not (tmp_path / "outside").exists()


def test_lines_are_not_added_to_a_file_with_another_name(outside: Path) -> None:
    (outside.parent / "run" / "metrics.jsonl").hardlink_to(outside)
    with pytest.raises(RefusedError, match="the same file has another name elsewhere"):
        atomic.append(outside.parent / "run" / "metrics.jsonl")
    assert outside.read_text() == "as it was"


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    atomic.write_text(file, "old")

    def fail(error: BaseException) -> None:
        with atomic.replacing(file) as opened:
            opened.write(b"ne")
            raise error

    with pytest.raises(OutputError, match=r"result\.json: can't be written \(No space left on device\)"):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_is_placed_in_one_step_and_takes_no_folders_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for target in ("a", "b"):
        atomic.place_link(tmp_path / "last", target)
        assert str((tmp_path / "last").readlink()) == target
    with pytest.raises(RefusedError, match="a: is a folder"):
        atomic.place_link(tmp_path / "a", "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "last"]


def test_text_that_utf_8_can_not_hold_is_written_as_escapes(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "file", "a\udcff\u00e9")
    assert (tmp_path / "file").read_bytes() == b"a\\udcff\xc3\xa9"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# What opens, makes or links a file by its path. In these modules it is on purpose:
WRITING = {
    "write_text", "write_bytes", "mkdir", "makedirs", "touch", "symlink_to", "symlink", "hardlink_to", "link",
    "copyfile", "copytree", "copy2", "mkstemp", "mkdtemp", "TemporaryDirectory", "NamedTemporaryFile",
    "save_file", "SummaryWriter", "export_chrome_trace", "mkfifo", "truncate",
}  # fmt: skip
ALLOWED = {
    # Into a folder that was just made under a name that nobody can foresee.
    "run/saving.py": {"mkdir", "save_file", "hardlink_to"},
    # The ending of its file's name can't be foreseen.
    # And it is given a descriptor of atomic.open_end.
    "run/curves.py": {"SummaryWriter", "fdopen"},
    # Into a folder of the system's own for such files.
    "commands/bench_cost.py": {"TemporaryDirectory", "export_chrome_trace"},
    "commands/export_check.py": {"TemporaryDirectory"},
    # From a folder of this project's own into one that atomic.new_folder made.
    "commands/export_hub.py": {"copytree"},
}


def _writes(tree: ast.AST) -> set[str]:
    """Return the calls in a module that write to a path of their own."""
    found = set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        text = ast.unparse(call)
        method = isinstance(call.func, ast.Attribute)
        if name in WRITING and (method or name in ("save_file", "SummaryWriter")):
            found.add(name)
        if name == "open" and any(flag in text for flag in ("O_WRONLY", "O_RDWR", "O_CREAT")):
            if "os.devnull" not in text:
                found.add("open")
        elif name in ("open", "fdopen") and "os.devnull" not in text:
            modes = [each.value for each in ast.walk(call) if isinstance(each, ast.Constant)]
            if any(
                isinstance(mode, str) and mode in {"w", "wb", "a", "ab", "x", "xb", "r+", "r+b"}
                for mode in modes
            ):
                found.add(name)
    return found


def test_no_other_module_opens_a_file_for_writing() -> None:
    found = {
        str(file.relative_to(PACKAGE)): writes
        for file in sorted(PACKAGE.rglob("*.py"))
        if file != PACKAGE / "atomic.py" and (writes := _writes(ast.parse(file.read_text())))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "path.open('w')", "open(path, 'ab')", "Path(x).write_text('')", "path.mkdir()",
        "os.open(p, os.O_RDWR)", "shutil.copyfile(a, b)", "save_file(t, p)",
        "os.fdopen(d, 'w')", "path.symlink_to(x)",
    ],
)  # fmt: skip
def test_such_calls_are_found(line: str) -> None:
    assert _writes(ast.parse(line))
    assert not _writes(ast.parse("path.open('rb'); write_text(path, ''); text.replace('a', 'w')"))


_opened: list[tuple[str, str]] = []  # a file that was opened to write, and the module that asked for it
_watched: list[str] = []


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event != "open" or not _watched or not isinstance(arguments[0], str):
        return
    path, _, flags = arguments
    if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
        frame = frame.f_back
    if str(Path(path).absolute()).startswith(_watched[0]):
        _opened.append((path, frame.f_code.co_filename if frame else "nobody"))


def test_every_file_of_a_run_is_opened_by_that_module(call: Command, tmp_path: Path) -> None:
    """As the interpreter tells it, of Python's own files; safetensors' raise no event."""
    sys.addaudithook(_note)
    _watched[:] = [str(tmp_path)]
    quick = ["threads=1", "data.workers=0"]
    try:
        model = [
            "model.depth=2",
            "model.dim=16",
            "model.heads=2",
            "trainer.max_steps=1",
            "trainer.batch_size=8",
        ]
        trained = call("train", *model, "trainer.threads=1", "data.workers=0", "run_dir=run")
        evaluated = call("eval", "checkpoint=run", "limit_batches=1", *quick)
        analysed = call("analyze", "checkpoint=run", "collapse.images=2", *quick)
    finally:
        _watched.clear()
    assert [each.returncode for each in (trained, evaluated, analysed)] == [0, 0, 0]
    by_module = {Path(module).name for path, module in _opened if "tfevents" not in path}
    assert by_module == {"atomic.py"}
    assert len(_opened) > 10
