"""`deepvit-bench` measures what models of one shape cost, side by side in one run.

The contenders take turns, so that a change of the machine's speed affects all of them. Every figure is a
median.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import nn

from deepvit_train.atomic import write_text
from deepvit_train.commands import bench_cost as cost
from deepvit_train.commands.bench_contender import build_contender
from deepvit_train.config.bench import BenchConfig
from deepvit_train.config.compose import plain
from deepvit_train.config.model import ModelConfig
from deepvit_train.console import amount, console, print_report
from deepvit_train.distributed.world import choose_device
from deepvit_train.error import OutputError
from deepvit_train.models.summary import count_parameters
from deepvit_train.run.environment import describe_machine

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """The costs of one contender. Times are medians; a ratio is to the time of the first contender."""

    contender: str
    value: int | None  # of the key that varies
    parameters: int
    train_ms: float
    train_ratio: float
    infer_ms: float
    infer_ratio: float
    saved_mib_per_image: float
    peak_mib: float
    train_samples_ms: list[float]
    infer_samples_ms: list[float]


def run(config: BenchConfig) -> dict[str, Any]:
    """Measure every contender. Print a table and a JSON object; write a JSON file and a figure on request.

    Raises ConfigError for a contender that can't be built, OutputError for a file that can't be written.
    """
    device = choose_device(config.device.value)
    if config.threads:
        torch.set_num_threads(config.threads)
    rows: list[Row] = []
    for value in config.values or [None]:
        model = config.model if value is None else _varied(config, value)
        rows += _measure(config, model, value, device)
        console.print(_table(config, [row for row in rows if row.value == value]))
    report = {
        "config": plain(config),
        "machine": describe_machine(device),
        "rows": [asdict(row) for row in rows],
    }
    try:
        if config.out is not None:
            write_text(Path(config.out).expanduser(), json.dumps(report, indent=1) + "\n")
        if config.plot is not None:
            from deepvit_train.commands.bench_figure import plot

            plot(report, Path(config.plot).expanduser())
    except OSError as error:
        raise OutputError(f"{error.filename}: can't be written ({error.strerror})") from None
    print_report(report)
    return report


def _varied(config: BenchConfig, value: int) -> ModelConfig:
    assert config.vary is not None
    return replace(config.model, **{config.vary.removeprefix("model."): value})


def _measure(config: BenchConfig, model: ModelConfig, value: int | None, device: torch.device) -> list[Row]:
    torch.manual_seed(0)
    size = model.image_size
    workload = cost.Workload(
        torch.randn(config.batch_size, 3, size, size, device=device),
        torch.randint(config.classes, (config.batch_size,), device=device),
        config.precision,
    )
    contenders = {name: build_contender(name, config, model).to(device).train() for name in config.contenders}
    memory = {name: _memory(contender, workload) for name, contender in contenders.items()}
    mode = config.compile.mode
    called = {
        name: each if mode is None else torch.compile(each, mode=mode) for name, each in contenders.items()
    }
    with nullcontext() if mode is None else _every_contender_compiled(len(called)):
        times = _take_turns(called, workload, config.repeats)
    first = config.contenders[0]
    rows = []
    for name, contender in contenders.items():
        train, infer = ([1e3 * each for each in times[name, kind]] for kind in ("train", "infer"))
        rows.append(
            Row(
                contender=name,
                value=value,
                parameters=count_parameters(contender),
                train_ms=median(train),
                train_ratio=median(times[name, "train"]) / median(times[first, "train"]),
                infer_ms=median(infer),
                infer_ratio=median(times[name, "infer"]) / median(times[first, "infer"]),
                saved_mib_per_image=memory[name][0] / MIB / config.batch_size,
                peak_mib=memory[name][1] / MIB,
                train_samples_ms=train,
                infer_samples_ms=infer,
            )
        )
    return rows


@contextmanager
def _every_contender_compiled(count: int) -> Iterator[None]:
    """Let torch compile one code more than eight times, because contenders of one class share theirs.

    Otherwise it would run the rest uncompiled, with no more than a warning.
    """
    import torch._dynamo.config  # takes a second

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8 * count):
        yield


def _memory(model: nn.Module, workload: cost.Workload) -> tuple[int, int]:
    saved = cost.saved_bytes(model, workload)
    peak = cost.peak_bytes(partial(workload.train, model), workload.images.device)
    model.zero_grad(set_to_none=True)
    return saved, peak


def _take_turns(
    contenders: dict[str, Any], workload: cost.Workload, repeats: int
) -> dict[tuple[str, str], list[float]]:
    """Return the seconds of each training step and each inference, by contender and kind.

    Every contender is measured once in each round. The first round warms up and is not counted.
    """
    times: dict[tuple[str, str], list[float]] = {}
    device = workload.images.device
    gc.collect()
    gc.disable()
    try:
        for round_number in range(repeats + 1):
            for name, model in contenders.items():
                for kind, step in (("train", workload.train), ("infer", workload.infer)):
                    model.train(kind == "train")
                    taken = cost.seconds(partial(step, model), device)
                    model.zero_grad(set_to_none=True)
                    if round_number:
                        times.setdefault((name, kind), []).append(taken)
    finally:
        gc.enable()
    return times


def _table(config: BenchConfig, rows: list[Row]) -> Table:
    value = "" if rows[0].value is None else f", {config.vary}={rows[0].value}"
    title = (
        f"medians of {config.repeats}, batch {config.batch_size}, {config.precision}, "
        f"{amount(torch.get_num_threads(), 'thread')}{value}"
    )
    table = Table(title=title)
    table.add_column("contender", no_wrap=True)
    for name in ("train ms", "ratio", "infer ms", "ratio", "saved MiB/image", "peak MiB"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.contender,
            f"{row.train_ms:.1f}",
            f"{row.train_ratio:.2f}",
            f"{row.infer_ms:.1f}",
            f"{row.infer_ratio:.2f}",
            f"{row.saved_mib_per_image:.1f}",
            f"{row.peak_mib:.0f}",
        )
    return table
