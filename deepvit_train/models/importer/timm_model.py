"""Any model of timm as timm itself builds it, with weights from a local file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from deepvit_train.config.preprocessing import Interpolation, Preprocessing
from deepvit_train.error import CheckpointError, ConfigError, nearest


def check_name(name: str, said: str) -> None:
    """Raise ConfigError for a name that timm has no model of.

    Args:
        said: the key and its value, for the message.
    """
    if not timm.is_model(name):
        raise ConfigError(f"{said}: timm has no such model{nearest(name, timm.list_models())}")


def build_timm_model(name: str, tensors: Mapping[str, Tensor] | None = None, load: bool = True) -> nn.Module:
    """Build timm's model of a name, with as many outputs as the tensors of a file have.

    Args:
        load: whether the model gets the tensors; otherwise they only say how many outputs it has.

    Raises CheckpointError if the tensors do not fit.
    """
    options: dict[str, Any] = {}
    if tensors is not None and (outputs := _outputs(name, tensors)) is not None:
        options["num_classes"] = outputs
    model = timm.create_model(name, pretrained=False, **options)
    if tensors is not None and load:
        try:
            model.load_state_dict(dict(tensors))
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"does not fit timm's {name} ({reason})") from None
    return model


def preprocessing_of_timm(model: nn.Module) -> Preprocessing:
    """Return what timm says about a model's images. Raises ConfigError for images that can't be prepared."""
    expected = resolve_model_data_config(model)
    channels, height, width = expected["input_size"]
    if height != width or channels != 3:
        raise ConfigError(
            f"model: takes images of {height} x {width} with {channels} channels; only square ones with 3 "
            "can be prepared"
        )
    try:
        interpolation = Interpolation(expected["interpolation"])
    except ConfigError:
        interpolation = Interpolation.bicubic  # nearest and lanczos are not offered here
    return Preprocessing(
        image_size=height,
        mean=tuple(expected["mean"]),
        std=tuple(expected["std"]),
        crop_pct=expected["crop_pct"],
        interpolation=interpolation,
    )


def _outputs(name: str, tensors: Mapping[str, Tensor]) -> int | None:
    """Return the number of outputs of a file's classifier, or None where timm does not say what it is."""
    described = timm.get_pretrained_cfg(name)
    classifier = None if described is None else described.classifier
    first = classifier[0] if isinstance(classifier, (list, tuple)) else classifier
    weight = tensors.get(f"{first or 'head'}.weight")
    return None if weight is None else len(weight)
