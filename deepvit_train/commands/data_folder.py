"""`deepvit-data demo` and `deepvit-data fashion-mnist` write a real data set as an ImageFolder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from deepvit_train.atomic import new_folder
from deepvit_train.config.data_folder import DataDemoConfig, DataFashionMnistConfig
from deepvit_train.console import amount, console, print_report
from deepvit_train.data.digits import write_digits
from deepvit_train.data.fashion_mnist import write_fashion_mnist

# What small grey pictures are trained with: a small model, and no flip, which makes another digit of a digit.
FITTING = {
    DataDemoConfig: "model=digits augment=digits",
    DataFashionMnistConfig: "model=digits model.image_size=28 augment=none",
}


def run(config: DataDemoConfig | DataFashionMnistConfig) -> dict[str, Any]:
    """Write out/{train,val}/CLASS/*.png, whole or not at all. The last line on stdout is a JSON object.

    Raises OutputError for a folder that holds something already or can't be written, DataError for sources
    that can't be read.
    """
    out = Path(config.out).expanduser()
    with new_folder(out) as folder:
        if isinstance(config, DataFashionMnistConfig):
            source = None if config.source is None else Path(config.source).expanduser()
            images = write_fashion_mnist(folder, source)
        else:
            images = write_digits(folder)
    classes = sum(entry.is_dir() for entry in (out / "train").iterdir())
    console.print(
        f"written: {out}: {images['train']:,} training and {amount(images['val'], 'validation image')} in "
        f"{amount(classes, 'class', 'classes')}"
    )
    folder, fitting = shlex.quote(f"data.root={out}"), FITTING[type(config)]
    console.print(f"train on them: deepvit-train data=imagefolder {folder} {fitting}", soft_wrap=True)
    report = {"out": str(out), "classes": classes, "images": images}
    print_report(report)
    return report
