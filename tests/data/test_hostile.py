"""Read five hundred broken and odd files: training and evaluation agree with the rules on which are good."""

from __future__ import annotations

import io
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepvit_train.commands import evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.data.dataset import ImageDataset
from deepvit_train.data.decode import BadImageError, Limits
from deepvit_train.data.index import scan_split
from deepvit_train.data.loader import Loader, LoaderOptions
from deepvit_train.data.order import EvalOrder
from deepvit_train.data.transform import train_transform
from deepvit_train.error import DataError
from tests.conftest import QUICK
from tests.data.picture import open_picture

FILES = 500
LIMITS = Limits(max_bytes=200_000, max_pixels=40_000)
Maker = Callable[[random.Random], bytes]


def noise(draws: random.Random, mode: str = "RGB") -> Image.Image:
    width, height = draws.choice([(1, 1), (2, 31), (40, 30), (17, 60), (1, 200)])
    rng = np.random.default_rng(draws.getrandbits(32))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    if mode in ("I", "F"):
        values = rng.integers(0, 65536, (height, width))
        return Image.fromarray(
            values.astype(np.int32) if mode == "I" else (values / 65535).astype(np.float32)
        )
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(draws: random.Random) -> bytes:
    kind, modes = draws.choice(
        [
            ("JPEG", ["RGB", "L", "CMYK", "YCbCr"]),
            ("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
            ("TIFF", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"]),
            ("GIF", ["L", "P", "RGB"]),
            ("WEBP", ["RGB", "RGBA"]),
            ("BMP", ["1", "L", "P", "RGB"]),
            ("PPM", ["1", "L", "RGB"]),
        ]
    )
    return saved(noise(draws, draws.choice(modes)), kind)


def animated(draws: random.Random) -> bytes:
    frames = [Image.new("RGB", (12, 9), (draws.randrange(256), 3, number)) for number in range(3)]
    kind = draws.choice(["GIF", "PNG", "WEBP", "TIFF"])
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


def turned(draws: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = draws.choice([0, 1, 3, 6, 8, 9, 77])
    return saved(noise(draws), draws.choice(["JPEG", "PNG", "WEBP", "TIFF"]), exif=exif)


def odd_metadata(draws: random.Random) -> bytes:
    kind = draws.choice(["JPEG", "WEBP"])
    return saved(noise(draws), kind, exif=b"Exif\x00\x00" + draws.randbytes(draws.randrange(60)))


def transparent_palette(draws: random.Random) -> bytes:
    return saved(noise(draws).convert("P"), draws.choice(["PNG", "GIF"]), transparency=draws.randrange(256))


def something_after_the_end(draws: random.Random) -> bytes:
    return saved(noise(draws), draws.choice(["JPEG", "PNG", "GIF", "BMP"])) + draws.randbytes(500)


def large_noise(draws: random.Random) -> Image.Image:
    rng = np.random.default_rng(draws.getrandbits(32))
    return Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))


def truncated(draws: random.Random) -> bytes:
    whole = saved(large_noise(draws), draws.choice(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]))
    return whole[: int(draws.uniform(0.01, 0.95) * len(whole))]


def no_image(draws: random.Random) -> bytes:
    return draws.choice(
        [
            draws.randbytes(draws.randrange(1, 3000)),
            b"<html><body>404 Not Found</body></html>",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"PK\x03\x04" + draws.randbytes(200),
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
            b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
            bytes(draws.randrange(1, 5000)),
            b"\xff\xd8\xff" + bytes(100),
            b"\x89PNG\r\n\x1a\n" + bytes(100),
        ]
    )


def bomb(draws: random.Random) -> bytes:
    size = draws.choice([(201, 200), (65_000, 65_000), (2**31 - 1, 2**31 - 1), (40_001, 1)])
    head = b"IHDR" + size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        for chunk in (head, b"IDAT" + body, b"IEND")
    )


def wrong_checksum(draws: random.Random) -> bytes:
    whole = bytearray(saved(large_noise(draws), "PNG"))
    whole[draws.randrange(60, len(whole) - 60)] ^= 255
    return bytes(whole)


def flipped(draws: random.Random) -> bytes:
    whole = bytearray(saved(noise(draws), draws.choice(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])))
    for _ in range(draws.randrange(1, 6)):
        whole[draws.randrange(len(whole))] = draws.randrange(256)
    return bytes(whole)


GOOD: list[Maker] = [
    plain,
    plain,
    animated,
    turned,
    odd_metadata,
    transparent_palette,
    something_after_the_end,
]
BAD: list[Maker] = [
    truncated,
    truncated,
    no_image,
    bomb,
    lambda draws: b"",
    lambda draws: bytes(200_001),
]
EITHER: list[Maker] = [flipped, wrong_checksum]
NAMES = ["jpg", "jpeg", "JPEG", "png", "PNG", "bmp", "tif", "tiff", "webp", "ppm"]


def write_files(root: Path) -> dict[str, bool | None]:
    """Write the files into three classes; whether each is good, or None where the rules leave it open."""
    verdicts: dict[str, bool | None] = {}
    for number in range(FILES):
        draws = random.Random(number)
        good = draws.choices([True, False, None], [5, 4, 1])[0]
        folder = root / "train" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number:03d}.{draws.choice(NAMES)}"
        content = draws.choice({True: GOOD, False: BAD, None: EITHER}[good])(draws)
        file.write_bytes(content)
        verdicts[str(file)] = good
    for number, make in enumerate(
        (os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path.name))
    ):
        file = root / "train" / "class0" / f"special{number}.png"
        make(file)
        verdicts[str(file)] = False
    (root / "val" / "class0").mkdir(parents=True)
    for name in ("class0", "class1", "class2"):
        (root / "val" / name).mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(root / "val" / name / "x.png")
    return verdicts


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool | None]]:
    root = tmp_path_factory.mktemp("hostile")
    return root, write_files(root)


def test_each_file_is_good_or_bad_as_the_rules_say(hostile: tuple[Path, dict[str, bool | None]]) -> None:
    _, verdicts = hostile
    found: dict[str, bool] = {}
    lines: list[tuple[str, str]] = []
    for file in verdicts:
        try:
            pixels, _ = open_picture(file, LIMITS).pixels()
        except BadImageError as error:
            found[file] = False
            lines.append((str(error), file))
        else:
            found[file] = True
            assert (pixels.ndim, pixels.shape[2], pixels.dtype) == (3, 3, np.uint8)
    wrong = {file: good for file, good in verdicts.items() if good is not None and found[file] != good}
    assert not wrong
    assert all(line.startswith(f"{file}: ") and line.isprintable() for line, file in lines)
    assert sum(found.values()) > 200
    assert len(found) - sum(found.values()) > 150


def test_training_batches_hold_good_images_only_and_name_the_bad(
    hostile: tuple[Path, dict[str, bool | None]],
) -> None:
    root, verdicts = hostile
    config = compose_command("train", ["augment=deit", "augment.color_jitter=0.3"])
    index = scan_split(root, "train", follow_links=False)
    transform = train_transform(config.model.preprocessing, config.augment)
    named = []
    for workers in (0, 2):
        dataset = ImageDataset(index, transform, 0, LIMITS, replacements=1000)
        order = EvalOrder(np.arange(len(index)), 64)
        loader = Loader(dataset, order, LoaderOptions(workers, torch.device("cpu")), [0.5] * 3, [0.5] * 3)
        batches = list(loader)
        loader.close()
        assert sum(len(batch.images) for batch in batches) == len(verdicts)
        named.append({line for batch in batches for line in batch.bad})
    assert named[0] == named[1]
    files = {line.split(": ")[0] for line in named[0]}
    assert len(files) == len(named[0])
    assert {file for file, good in verdicts.items() if good is False} <= files
    assert not files & {file for file, good in verdicts.items() if good}


def test_a_run_replaces_them_or_stops_and_an_evaluation_never_replaces(
    hostile: tuple[Path, dict[str, bool | None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, verdicts = hostile
    overrides = [
        *QUICK,
        "data=imagefolder",
        f"data.root={root}",
        "data.workers=0",
        "data.max_bytes=200000",
        "data.max_pixels=40000",
        "trainer.batch_size=16",
        "trainer.epochs=1",
        "schedule.warmup_epochs=0",
        "trainer.limit_batches=null",
    ]
    train.run(compose_command("train", [*overrides, f"run_dir={tmp_path}/run", "data.max_bad=400"]))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bad image, replaced")]
    assert len(said) == len(set(said))
    bad = {file for file, good in verdicts.items() if good is False}
    assert len(bad - {line.split(": ")[1] for line in said}) < 16  # an epoch leaves the rest of a batch out
    with pytest.raises(DataError, match=r"more than data\.max_bad=7") as error:
        train.run(compose_command("train", [*overrides, f"run_dir={tmp_path}/strict", "data.max_bad=7"]))
    assert error.value.exit_code == 4
    capsys.readouterr()
    where = [
        f"checkpoint={tmp_path}/run",
        f"data.root={root}",
        "data.split=train",
        "data.workers=0",
        "threads=1",
    ]
    with pytest.raises(DataError, match="an evaluation replaces no image"):
        evaluate.run(compose_command("eval", where))
