"""`deepvit-data demo` and `deepvit-data fashion-mnist`: write a real data set as an ImageFolder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from deepvit_train.data.digits import write_digits
from deepvit_train.data.fashion_mnist import write_fashion_mnist
from deepvit_train.error import OutputError
from deepvit_train.schema.command import DataDemoConfig, DataFashionMnistConfig
from deepvit_train.tracking import console


def run(config: DataDemoConfig | DataFashionMnistConfig) -> dict[str, Any]:
    """Write out/{train,val}/CLASS/*.png, whole or not at all; a JSON object is the last line on stdout.

    Raises OutputError for a folder that holds something already or can't be written, DataError for sources
    that can't be read.
    """
    out = Path(config.out).expanduser()
    try:
        if out.exists() and any(out.iterdir()):
            raise OutputError(f"out={config.out}: holds something already; name a new folder or empty it")
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the rename stays on one file system.
        partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise OutputError(f"out={config.out}: can't be written ({error.strerror})") from None
    try:
        if isinstance(config, DataFashionMnistConfig):
            source = None if config.source is None else Path(config.source).expanduser()
            images = write_fashion_mnist(partial, source)
        else:
            images = write_digits(partial)
        partial.chmod(0o755)  # mkdtemp makes it the owner's alone
        partial.rename(out)
    except OSError as error:
        raise OutputError(f"out={config.out}: can't be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    classes = sum(entry.is_dir() for entry in (out / "train").iterdir())
    console.print(
        f"written: {out}: {images['train']:,} training and {images['val']:,} validation images in {classes} "
        "classes"
    )
    console.print(f"train on them: deepvit-train data=imagefolder data.root={out}")
    report = {"out": str(out), "classes": classes, "images": images}
    print(json.dumps(report), flush=True)
    return report
