"""What timm says of a model and of its optimizers, for a command line of timm's that is translated."""

from __future__ import annotations

import warnings
from typing import Any

import timm
import torch
from timm.optim import list_optimizers
from torch import nn

from deepvit_train.config.preset import plain_from
from deepvit_train.error import ConfigError, nearest
from deepvit_train.models.importer.timm_cache import known
from deepvit_train.models.importer.timm_name import architecture_of, differences

PLAIN = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")]


def model_keys(name: str) -> dict[str, Any]:
    """Return the keys of `model` for timm's model of a name, 'vit_large_patch16_224', with or without '.TAG'.

    Mean, deviation, crop and interpolation are those that timm keeps for the name and tag. `weights` names
    its pretrained weights as they are called today.

    Raises ConfigError for a name that timm does not know, and for a model that can't be trained here.
    """
    if ":" in name or "/" in name:
        raise ConfigError(
            f"--model {name}: its shape is known to its server alone; nearest: --model NAME of timm, and "
            "model.weights=hf:ORG/NAME"
        )
    try:
        model = _built(name)
    except RuntimeError:  # an unknown name, or an unknown tag
        names = timm.list_models(pretrained="." in name)
        raise ConfigError(f"--model {name}: timm has no such model{nearest(name, names)}") from None
    if problems := list(differences(model)):
        own = _parameters(model)
        near = min(PLAIN, key=lambda plain: abs(_parameters(_built(plain)) - own))
        raise ConfigError(
            f"--model {name}: {'; '.join(problems)}, so it can't be trained here\n"
            f"nearest by its {own / 1e6:.1f} million parameters: --model {near}"
        )
    keys: Any = plain_from(architecture_of(model).model)
    scale = model.blocks[0].ls1  # its architecture has the scale of loaded weights
    if not isinstance(scale, nn.Identity):
        keys["layer_scale"] = scale.init_values
    if known(name) is None:  # an earlier name, under which timm finds no weights
        name = ".".join(filter(None, (model.pretrained_cfg["architecture"], model.pretrained_cfg["tag"])))
    return keys | {"weights": f"timm:{name}"}


def optimizers() -> list[str]:
    """Return the names of timm's optimizers."""
    return [str(name) for name in list_optimizers()]


def _built(name: str) -> Any:
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return timm.create_model(name)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
