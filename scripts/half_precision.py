"""Measure how far re-attention is from float64 on a trained model's own queries, keys and values.

    python -m scripts.half_precision RUN [IMAGES]

The error is |found - exact| / |exact|, for the output and for the gradients of q and Theta. It is measured in
each block that mixes its heads, with the batch's statistics, for the operator and for the formula under
autocast.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deepvit_train.config.compose import compose_command
from deepvit_train.data.index import open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed.world import World
from deepvit_train.evaluation.loaded import load
from deepvit_train.models import ReAttention
from deepvit_train.models.reattention import (
    HeadMixer,
    mix_heads,
    plain_reattention,
    reattention,
    softmax_maps,
)

Inputs = tuple[Tensor, Tensor, Tensor]


def by_autocast(q: Tensor, k: Tensor, v: Tensor, mixer: HeadMixer, dtype: torch.dtype) -> Tensor:
    """Compute the formula under autocast: the softmax in float32, then every product with rounded maps."""
    with torch.autocast("cpu", dtype):
        return mix_heads(softmax_maps(q, k), mixer) @ v


WAYS = {
    "operator, fp32": (torch.float32, reattention),
    "operator, bf16": (torch.bfloat16, reattention),
    "operator, fp16": (torch.float16, reattention),
    "formula, fp32": (torch.float32, plain_reattention),
    "formula under autocast, bf16": (torch.bfloat16, partial(by_autocast, dtype=torch.bfloat16)),
    "formula under autocast, fp16": (torch.float16, partial(by_autocast, dtype=torch.float16)),
}


def record(run: str, images: int) -> list[tuple[ReAttention, Inputs]]:
    """Return each block that mixes its heads, with its q, k and v for images of the validation split."""
    loaded = load(run, "auto")
    config = compose_command("eval", [f"checkpoint={run}", "data.workers=0"])
    data, world = loaded.data_for(config.data), World(0, 1, torch.device("cpu"))
    index = open_split(data, "val")
    loaders = Loaders(loaded.architecture.model.preprocessing, data, world)
    batch = next(iter(loaders.evaluation(index, images)))
    found = []
    model = loaded.model.train()
    for module in model.modules():
        if isinstance(module, ReAttention):

            def recording(q: Tensor, k: Tensor, v: Tensor, of: Any = (module, module.attend)) -> Tensor:
                found.append((of[0], (q, k, v)))
                return of[1](q, k, v)

            module.attend = recording
    with torch.no_grad():
        model(batch.images)
    return found


def results(function: Any, dtype: torch.dtype, module: ReAttention, inputs: Inputs) -> list[Tensor]:
    """Return the output and the gradients of q and Theta, in float64.

    q, k and v are rounded to `dtype` first. Theta stays in float32 at least.
    """
    full = torch.promote_types(dtype, torch.float32)
    q, k, v = (each.detach().to(dtype).requires_grad_() for each in inputs)
    theta = module.theta.detach().to(full).requires_grad_()
    bias = None if module.theta_bias is None else module.theta_bias.detach().to(full)
    norm = None if module.norm is None else copy.deepcopy(module.norm).to(full)
    out = function(q, k, v, HeadMixer(theta, bias, norm))
    direction = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).view_as(out).mul(7.0).cos()
    gradients = torch.autograd.grad(out, [q, theta], direction.to(out.dtype))
    return [each.detach().double() for each in (out, *gradients)]


def main() -> None:
    """Print a table of the errors: the median block, and the worst."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run of deepvit-train")
    parser.add_argument("images", metavar="IMAGES", type=int, nargs="?", default=64)
    given = parser.parse_args()
    torch.manual_seed(0)
    blocks = record(given.run, given.images)
    errors: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    spread = []
    for module, inputs in blocks:
        exact = results(plain_reattention, torch.float64, module, inputs)
        maps = softmax_maps(inputs[0].double(), inputs[1].double())
        spread.append(float(maps.std() * maps.shape[-1]))
        for name, (dtype, function) in WAYS.items():
            found = results(function, dtype, module, inputs)
            pairs = zip(found, exact, strict=True)
            errors[name].append([float((one - two).norm() / two.norm()) for one, two in pairs])
    spread.sort()
    title = (
        f"{len(blocks)} blocks, {given.images} images; standard deviation of N A: least {spread[0]:.2g}, "
        f"median {spread[len(spread) // 2]:.2g}, most {spread[-1]:.2g}"
    )
    table = Table("relative error: median block (worst)", "output", "gradient of q", "of Theta", title=title)
    for name, rows in errors.items():
        columns = [sorted(column) for column in zip(*rows, strict=True)]
        table.add_row(name, *(f"{column[len(column) // 2]:.1e} ({column[-1]:.1e})" for column in columns))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
