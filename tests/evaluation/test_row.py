"""Rows of predictions are read back as they were written, and damage is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepvit_train.data.index import index_images
from deepvit_train.error import CheckpointError
from deepvit_train.evaluation.row import read_rows, rows_of, write_rows
from tests.evaluation.synthetic import predictions_of

NAMES = ["ant", 'b"e,e', "größe"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    index = index_images(
        tmp_path / "val", {"ant": ["ant/1,2.png", "ant/\udcff.png"], NAMES[1]: ['b"e,e/3.png']}
    )
    logits = np.float32([[1, 0, 0.5], [np.nan, np.nan, np.nan], [0, 0, 9]])
    with np.errstate(all="ignore"):
        seen = predictions_of(logits, np.array([0, 0, 1]))
    write_rows(rows_of(seen, index, NAMES), tmp_path)
    return tmp_path


def test_rows_come_back(folder: Path) -> None:
    first, second, third = read_rows(folder / "predictions.csv")
    assert (first.path, first.label, first.prediction, first.right) == ("ant/1,2.png", "ant", "ant", True)
    assert (second.path, second.prediction, second.right) == ("ant/\\udcff.png", "", False)
    assert np.isnan(second.probability)
    assert (third.label, third.prediction, third.right) == ('b"e,e', "größe", False)
    expected = np.exp([1, 0, 0.5]) / np.exp([1, 0, 0.5]).sum()
    assert first.probability == pytest.approx(expected[0], rel=1e-8)
    assert first.loss == pytest.approx(-np.log(expected[0]), rel=1e-8)


def test_parquet_holds_the_same(folder: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(folder / "predictions.parquet").to_pydict()
    rows = read_rows(folder / "predictions.csv")
    assert table["path"] == [row.path for row in rows]
    assert table["class"] == [row.label for row in rows]
    assert table["prediction"] == [row.prediction for row in rows]
    assert table["loss"][2] == pytest.approx(rows[2].loss)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not the columns"),
        (b"path,class\n", "not the columns"),
        (b"path,class,prediction,probability,loss\na,b,c,0.5\n", "a row of 4 values"),
        (b"path,class,prediction,probability,loss\na,b,c,x,1\n", "could not convert"),
        (b"path,class,prediction,probability,loss\n\xff,b,c,1,1\n", "decode"),
    ],
)
def test_damage_is_told(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        read_rows(tmp_path / "p.csv")
