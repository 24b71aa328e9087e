"""What `deepvit-data demo` and `deepvit-data fashion-mnist` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from deepvit_train.config.option import Section, option
from deepvit_train.error import DataError, OutputError


@dataclass(kw_only=True, slots=True)
class DataDemoConfig(Section):
    """Write scikit-learn's handwritten digits as a folder of images."""

    out: str = option("new folder to write train/ and val/ into", path=OutputError)


@dataclass(kw_only=True, slots=True)
class DataFashionMnistConfig(Section):
    """Write Fashion-MNIST as a folder of images."""

    out: str = option("new folder to write train/ and val/ into", path=OutputError)
    source: str | None = option(
        "folder that holds the four idx files, gzipped or not; null: that of the Debian package "
        "dataset-fashion-mnist",
        path=DataError,
    )
