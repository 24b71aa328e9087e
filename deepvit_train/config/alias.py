"""Translate names that have changed since version 0.1, and other spellings. They are read, never written.

vit-pytorch's form was called `seed` then. Today that word means a random seed only. `compile` was true or
false.
"""

from __future__ import annotations

from typing import Any

from deepvit_train.config.data import DataConfig, data_set_name

COMPILE = {
    "true": "default",
    "false": "none",
    "reduce-overhead": "reduce_overhead",
    "max-autotune": "max_autotune",
}

# For each key the name in version 0.1, and the name today.
RENAMED = {
    "attn": {"reattention_seed": "reattention_vit_pytorch"},
    "attn.kind": {"reattention_seed": "reattention_vit_pytorch"},
    "model.init": {"seed": "vit_pytorch"},
    "trainer.compile": COMPILE,
    "compile": COMPILE,
}

# Words that are typed for null, because they say what it means.
WORDS = {"attn.from_block": "auto", "trainer.accumulate": "auto"}

# What a version without such a key did. A key that is not here asked for nothing: false or null.
BEFORE = {
    "trainer.ema_warmup": True,
    "attn.qk_gain": 1.0,
    "trainer.report": True,
    "tracker": ["tensorboard"],
    "distill.weights": "auto",
    "distill.kind": "soft",
    "distill.share": 0.5,
    "distill.temperature": 1.0,
    "trainer.select_by": "top1",
    "schedule.name": "cosine",
    "schedule.decay_share": 0.2,  # this and other keys of choices that were not there
    "schedule.decay_epochs": 30.0,
    "schedule.decay_rate": 0.1,
    "loss.name": "cross_entropy",
    "loss.class_weight": "none",
    "loss.effective_beta": 0.999,
    "loss.focal_gamma": 2.0,
    "data.balance": "none",
    "optim.mixing_rate": 1.0,
    "model.act": "gelu",
    "model.class_token": True,
    "model.final_norm": True,
}
# Keys of `model` that a description in a weights file of an earlier version does not have.
NEWER = {"act": "gelu", "class_token": True, "final_norm": True, "pre_norm": False, "qk_norm": False}
# The same of `attn`.
NEWER_ATTN = {"theta_frozen": False, "qk_gain": 1.0}

# Keys that may be typed without their section.
SHORT = {"class_map": "data.class_map"}
# Keys of lists whose single value may be typed without brackets.
LISTS = {"tracker", "average"}


def current(key: str, value: Any) -> Any:
    """Return today's name of a key's value: current("model.init", "seed") is "vit_pytorch".

    Any other value is returned as it is.
    """
    text = str(value).lower() if isinstance(value, bool) else value
    return RENAMED.get(key, {}).get(text, value) if isinstance(text, str) else value


def current_override(override: str) -> str:
    """Return an override, KEY=VALUE as it is typed on a command line, with today's name of the value."""
    key, equals, value = override.partition("=")
    key = SHORT.get(key, key)
    override = f"{key}{equals}{value}"
    if key in LISTS and value and not value.startswith(("[", "$")) and "," not in value:
        return f"{key}=[{value}]"
    text = value.strip("'\"")  # Hydra takes a text in quotes too
    name = key.lstrip("+")
    renamed = "null" if text == WORDS.get(name) else current(name, text)
    return override if renamed == text else f"{key}{equals}{renamed}"


def current_config(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested configuration, such as a run's config.yaml, with today's names of its values."""
    return {
        name: current_config(value, f"{prefix}{name}.")
        if isinstance(value, dict)
        else current(f"{prefix}{name}", value)
        for name, value in config.items()
    }


def former_names(name: str, data: DataConfig | None) -> list[str]:
    """Return the names that version 0.1 gave to a run, such as digits-reattention_seed-d6-s0.

    They held the kind of the data set, and not its folder.
    """
    names = [name]
    if data is not None:
        data_set = data_set_name(data.name, data.root)
        names += [f"{data.name}{name.removeprefix(data_set)}"] * name.startswith(f"{data_set}-")
    for former, today in RENAMED["attn"].items():
        names += [each.replace(today, former) for each in names]
    return [each for each in dict.fromkeys(names) if each != name]
