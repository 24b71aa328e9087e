"""The state of any optimizer as tensors by name, and back.

    exp_avg.blocks.0.attn.qkv.weight   what the optimizer keeps of a parameter
    group.0.step                       what it keeps of a group of parameters

Counters that are Python's numbers become tensors without dimensions, of int64, float64 or bool.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deepvit_train.distributed.parallel import placed_like

GROUP = "group"
# What every group holds, apart from its optimizer's arguments.
FIXED = {"params", "initial_lr", "lr_scale", "weight_decay", "lr", "param_names"}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by name. It is empty before the first step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        f"{key}.{names[parameter]}": _as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }
    if not found:
        return {}
    for number, group in enumerate(optimizer.param_groups):
        found |= {f"{GROUP}.{number}.{key}": _as_tensor(group[key]) for key in _moving(optimizer, group)}
    return found


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its state, as it does in its first step. The weights must be loaded afterwards.

    So a checkpoint can be compared with what this optimizer keeps, and its tensors go where they belong. The
    step is made with gradients of zero; weight decay changes the weights.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, values in zip(optimizer.param_groups, before, strict=True):
        # A counter that the optimizer only has after a step stays, to be overwritten.
        group |= values


def set_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of a checkpoint in the place of the optimizer's state. They must be those it keeps."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == GROUP:
            number, _, key = rest.partition(".")
            holder: dict[str, Any] = optimizer.param_groups[int(number)]
        else:
            key, holder = kind, optimizer.state[parameters[rest]]
        before = holder[key]
        holder[key] = placed_like(before, value) if isinstance(before, Tensor) else value.item()


def without_state(expected: Iterable[str], tensors: Iterable[str]) -> set[str]:
    """Return the parameters of which a checkpoint holds nothing: no gradient has ever reached them.

    Args:
        expected: names of the tensors that this optimizer keeps.
        tensors: names of those that a checkpoint holds.
    """
    of, held = (
        {name.partition(".")[2] for name in names if not name.startswith(f"{GROUP}.")}
        for names in (expected, tensors)
    )
    return of - held


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    kind = {bool: torch.bool, int: torch.int64, float: torch.float64}[type(value)]
    return torch.tensor(value, dtype=kind)


def _moving(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[str]:
    """Return the keys of a group that the optimizer counts in, and that are no arguments of it."""
    given = inspect.signature(type(optimizer).__init__).parameters
    return [
        key
        for key, value in group.items()
        if key not in FIXED
        and key not in given
        and (type(value) in (int, float) or isinstance(value, Tensor))
    ]
