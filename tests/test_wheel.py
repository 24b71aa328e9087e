"""Use the package as a user installs it: build a wheel, install it elsewhere, run it from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import QUICK

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_configuration_and_nothing_else_of_the_project(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("deepvit_train/") for name in names if name.endswith(".yaml")}
    assert shipped == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"deepvit_train"}


@pytest.mark.runs
def test_the_installed_commands_train_and_evaluate_from_another_folder(
    wheel: Path, digits: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    (tmp_path / "work").mkdir()

    def run(command: str, *overrides: str) -> str:
        result = subprocess.run(
            [sys.executable, str(site / "bin" / command), *overrides],
            cwd=tmp_path / "work",
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert f"from {site}" in run("deepvit-train", "--version")
    run("deepvit-train", *QUICK, "name=elsewhere")
    report = json.loads(run("deepvit-eval", "checkpoint=runs/elsewhere", "threads=1").splitlines()[-1])
    assert report["images"] == 364
