"""Builds the optimizer by timm's factory: groups of parameters, arguments, and what is said of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from deepvit_train.config.recipe import SCHEDULE_FREE, OptimConfig
from deepvit_train.error import ConfigError, nearest
from deepvit_train.models import Attention, DeepViT

# Arguments that have keys of their own, or that a run sets.
OWN_KEYS = {
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "betas": "optim.betas",
    "eps": "optim.eps",
}
UNSET = {"self", "params", "defaults"}
# Names in timm that a run could not go on with to the bit, or not at all.
REFUSED = {
    "kron": "it draws random numbers of its own, which no checkpoint holds",
    "adahessian": "it needs second derivatives",
}
SCHEDULE_FREE_CLASSES = {
    f"{SCHEDULE_FREE}adamw": "AdamWScheduleFree",
    f"{SCHEDULE_FREE}sgd": "SGDScheduleFree",
    f"{SCHEDULE_FREE}radam": "RAdamScheduleFree",
}


def build_optimizer(model: DeepViT, optim: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of a model's parameters, those that are frozen left out.

    One-dimensional parameters, the positions and the class token get no weight decay. With layer decay, a
    block's learning rate is `layer_decay` times that of the block after it. The head has the full rate, and
    the stem and the tokens have the lowest (timm's groups). Muon treats the matrices of the blocks, and its
    AdamW the rest.

    Raises ConfigError for a name or an argument that can't be used, with the nearest that can.
    """
    arguments = _arguments(optim)
    groups = _groups(model, optim)
    try:
        if optim.is_schedule_free:
            optimizer = _schedule_free_class(optim)(groups, **arguments)
            optimizer.train()
            return optimizer
        return create_optimizer_v2(groups, opt=optim.name, **arguments)
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        options = f" optim.options={optim.options}" if optim.options else ""
        raise ConfigError(f"optim.name={optim.name}{options}: {error}") from None


def _groups(model: DeepViT, optim: OptimConfig) -> list[dict[str, Any]]:
    exempt = model.no_weight_decay()
    if not optim.decay_theta:
        mixing = _mixing(model)
        exempt |= {name for name, each in model.named_parameters() if id(each) in mixing and each.ndim == 2}
    groups: Any
    if optim.layer_decay == 1.0:
        groups = param_groups_weight_decay(model, optim.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, optim.weight_decay, exempt, layer_decay=optim.layer_decay)
    if optim.mixing_rate != 1.0:
        groups = with_mixing_rate(groups, model, optim.mixing_rate)
    if _is_muon(optim.name):
        matrices = _matrices(model)
        groups = [
            {**part, "use_muon": of_matrices}
            for group in groups
            for part, of_matrices in _parted(group, matrices)
        ]
    return groups


def with_mixing_rate(groups: list[dict[str, Any]], model: DeepViT, rate: float) -> list[dict[str, Any]]:
    """Part each group of parameters in two: what mixes heads learns at so many times the group's rate."""
    mixing = _mixing(model)
    return [
        part | {"lr_scale": group.get("lr_scale", 1.0) * rate} if mixes else part
        for group in groups
        for part, mixes in _parted(group, mixing)
    ]


def _mixing(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that mix heads, as the attention of each block names them."""
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    return {id(parameter) for attention in attentions for parameter in attention.mixing_parameters()}


def _is_muon(name: str) -> bool:
    return name.endswith("muon")


def _matrices(model: DeepViT) -> set[int]:
    """Return the ids of the parameters that Muon treats: the blocks' matrices that mix no heads.

    Muon's author leaves out what meets the images and the classes: stem, tokens and head.
    """
    matrices = {id(parameter) for parameter in model.blocks.parameters() if parameter.ndim == 2}
    return matrices - _mixing(model)


def _parted(group: dict[str, Any], chosen: set[int]) -> list[tuple[dict[str, Any], bool]]:
    """Part a group of parameters in those that are not chosen and those that are; none is empty."""
    parts = []
    for is_chosen in (False, True):
        parameters = [each for each in group["params"] if (id(each) in chosen) == is_chosen]
        if parameters:
            parts.append((group | {"params": parameters}, is_chosen))
    return parts


def _arguments(optim: OptimConfig) -> dict[str, Any]:
    """Return the optimizer's arguments. Raises ConfigError for one that it does not take."""
    kind = _class_of(optim)
    takes = {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name not in UNSET and parameter.kind != inspect.Parameter.VAR_KEYWORD
    }
    info = None if optim.is_schedule_free else get_optimizer_info(optim.name)
    found: dict[str, Any] = {"lr": optim.lr}
    for name, value, has in (
        ("betas", optim.betas, info is None or info.has_betas),
        ("eps", optim.eps, info is None or info.has_eps),
    ):
        if value is None:
            continue
        if not has or name not in takes:
            raise ConfigError(f"optim.{name}={value}: {optim.name} has none; nearest: optim.{name}=null")
        found[name] = tuple(value) if isinstance(value, list) else value
    if (count := getattr(info, "num_betas", 2)) != len(optim.betas or [0] * count):
        raise ConfigError(f"optim.betas={optim.betas}: {optim.name} needs {count} numbers")
    if optim.name == "adamw":
        found["fused"] = True  # one call for all tensors
    return found | {name: _option(optim.name, takes, name, value) for name, value in optim.options.items()}


def _option(optimizer: str, takes: dict[str, Any], name: str, value: Any) -> Any:
    """Return an argument of optim.options. Raises ConfigError if there is none such, or of another type."""
    told = f"optim.options={{{name}: {value}}}"
    if name in OWN_KEYS:
        raise ConfigError(f"{told}: is a key of its own; nearest: {OWN_KEYS[name]}={value}")
    known = [each for each in takes if each not in OWN_KEYS]
    if name not in known:
        raise ConfigError(
            f"{told}: {optimizer} has no such argument{nearest(name, known)} (it has: {', '.join(known)})"
        )
    default = takes[name]
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, (int, float)):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif isinstance(default, tuple):
        fits = isinstance(value, list) and len(value) == len(default)
    else:
        fits = not isinstance(default, str) or isinstance(value, str)
    if not fits:
        shown = list(default) if isinstance(default, tuple) else default
        raise ConfigError(f"{told}: must be like {shown}, its default")
    return tuple(value) if isinstance(value, list) else value


def _class_of(optim: OptimConfig) -> type[torch.optim.Optimizer]:
    """Return the optimizer's class. Raises ConfigError for a name that can't be used."""
    if optim.is_schedule_free:
        return _schedule_free_class(optim)
    known: list[Any] = list_optimizers()
    if optim.name not in known:
        guess = nearest(optim.name, [*known, *SCHEDULE_FREE_CLASSES])
        raise ConfigError(f"optim.name={optim.name}: timm has no such optimizer{guess}")
    kind = get_optimizer_info(optim.name).opt_class
    if isinstance(kind, str):
        raise ConfigError(
            f"optim.name={optim.name}: is of the package {kind.split('.')[0]}, whose state is not kept here; "
            "nearest: optim=adamw"
        )
    for begin, reason in REFUSED.items():
        if optim.name.startswith(begin):
            raise ConfigError(f"optim.name={optim.name}: {reason}; nearest: optim=adamw")
    return kind


def _schedule_free_class(optim: OptimConfig) -> Any:
    if optim.name not in SCHEDULE_FREE_CLASSES:
        raise ConfigError(
            f"optim.name={optim.name}: unknown{nearest(optim.name, SCHEDULE_FREE_CLASSES)} (choices: "
            f"{', '.join(SCHEDULE_FREE_CLASSES)})"
        )
    try:
        import schedulefree  # only a run that uses it waits for it
    except ImportError:
        raise ConfigError(
            f"optim.name={optim.name}: the package schedulefree is missing; nearest: "
            "pip install 'deepvit-train[schedulefree]'"
        ) from None
    return getattr(schedulefree, SCHEDULE_FREE_CLASSES[optim.name])


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the schedule's learning rate, which the classifier has."""
    return max(group["lr"] for group in optimizer.param_groups if group.get("lr_scale", 1.0) == 1.0)


def is_partial(optim: OptimConfig) -> bool:
    """Return whether some parameters learn at another rate than others, or not at all."""
    return optim.layer_decay != 1.0 or optim.mixing_rate != 1.0 or optim.freeze_blocks > 0 or optim.head_only


def describe_groups(optimizer: torch.optim.Optimizer) -> str:
    """Return how many parameters have which share of the learning rate: 'x1 for 650, x0.75 for 12,345'."""
    counts: dict[float, int] = {}
    for group in optimizer.param_groups:
        scale = group.get("lr_scale", 1.0)
        counts[scale] = counts.get(scale, 0) + sum(parameter.numel() for parameter in group["params"])
    return ", ".join(f"x{scale:.3g} for {counts[scale]:,}" for scale in sorted(counts, reverse=True))


def describe_muon(optimizer: torch.optim.Optimizer) -> str | None:
    """Return how many parameters Muon treats, and how many its AdamW; None for another optimizer."""
    counts = {True: 0, False: 0}
    matrices = 0
    for group in optimizer.param_groups:
        if "use_muon" not in group:
            return None
        counts[group["use_muon"]] += sum(parameter.numel() for parameter in group["params"])
        matrices += len(group["params"]) * group["use_muon"]
    return (
        f"muon: {counts[True]:,} parameters in {matrices} matrices of the blocks; AdamW: {counts[False]:,} "
        "in Theta, tokens, stem, head, norms and biases"
    )
