"""Register the presets with timm: after `import deepvit_train.models`, timm.create_model('deepvit_s') works.

The sizes come from configs/model/*.yaml. timm's keywords and this project's keys can change them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from deepvit_train.config.model import AttentionConfig, ModelConfig
from deepvit_train.config.preset import (
    Architecture,
    attention_preset,
    choices,
    model_preset,
    plain_from,
    section_from,
)
from deepvit_train.config.timm_command import KEYWORDS
from deepvit_train.error import ConfigError, nearest
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.timm_interface import pretrained_cfg_of

# All but the small model of the embedded data set, which has the name of its data.
PRESETS = [name for name in choices("model") if name not in choices("data")]


def _build(
    preset: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    global_pool: str | None = None,
    drop_rate: float = 0.0,
    attn: str | None = None,
    attn_drop_rate: float | None = None,
    **changes: Any,
) -> DeepViT:
    """Build the model of a preset, with changes.

    Args:
        preset: name of the preset: 'deepvit_s'.
        num_classes: width of the classifier; 0: no classifier.
        in_chans: colour channels of the images.
        global_pool: 'token', 'avg', or '' for all tokens; None: as the preset says.
        drop_rate: dropout before the classifier.
        attn: name of another attention: 'self', 'talking_heads'.
        attn_drop_rate: dropout on the softmax maps; None: as the preset says.
        changes: timm's keywords, or keys of `model` and `attn` in the configuration.

    Raises:
        ConfigError: (a ValueError) a keyword does not exist, or a value is out of bounds.
    """
    architecture = model_preset(preset)
    chosen = architecture.attn if attn is None else attention_preset(attn)
    sections = {"model": plain_from(architecture.model), "attn": plain_from(chosen)}
    if attn_drop_rate is not None:
        sections["attn"]["dropout"] = attn_drop_rate
    for name, value in changes.items():
        key = KEYWORDS.get(name, name)
        section = next((keys for keys in sections.values() if key in keys), None)
        if section is None:
            known = [*KEYWORDS, *sections["model"], *sections["attn"]]
            raise ConfigError(f"{preset}: no such keyword as {name}{nearest(name, known)}")
        section[key] = _square(name, value) if key in ("image_size", "patch_size") else value
    changed = Architecture(
        section_from(ModelConfig, sections["model"]), section_from(AttentionConfig, sections["attn"])
    )
    model = DeepViT(changed, num_classes, in_chans)
    model.head_drop.p = drop_rate
    if global_pool is not None:
        model.set_pool(global_pool)
    return model


def _square(name: str, value: Any) -> int:
    sides = set(value) if isinstance(value, (tuple, list)) else {value}
    if len(sides) > 1:
        raise ConfigError(f"{name}={tuple(value)}: must be square")
    return sides.pop()


def _entry_point(name: str) -> Callable[..., DeepViT]:
    def create(pretrained: bool = False, **kwargs: Any) -> DeepViT:
        # With hf-hub: or local-dir: timm gives the place of the weights as well.
        if pretrained and kwargs.get("pretrained_cfg") is None:
            raise ConfigError(f"{name}: no weights are published; use load_model, or checkpoint_path=")
        return build_model_with_cfg(
            _build,
            name,
            pretrained,
            preset=name,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **kwargs,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"configs/model/{name}.yaml"
    return create


default_cfgs = generate_default_cfgs(
    {name: pretrained_cfg_of(model_preset(name).model, num_classes=1000) for name in PRESETS}
)
for _name in PRESETS:
    register_model(_entry_point(_name))
