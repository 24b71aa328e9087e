"""Translate what a command line of timm's says of a model: its shape, its images and its weights."""

from __future__ import annotations

import re
from typing import Any

from deepvit_train.config.compose import compose_tree, flat_values
from deepvit_train.config.preset import choices, model_preset, plain_from
from deepvit_train.config.timm_command import KEYWORDS, Command

# What the presets of these names are. Of others timm is asked.
PRESET = re.compile(r"(vit|deit)_(tiny|small|base)_patch16_224")
DEIT_V2 = re.compile(r"(deit)_(tiny|small|base)_patch16_LS")  # DeiT's own; timm has no such names
POOLS = {"token": "cls", "avg": "mean_patches"}
# Keys that flags and defaults of the program set, whatever the model is.
OF_FLAGS = ("drop_path", "dropout", "emb_dropout", "weights", "init")


def translate_model(command: Command) -> None:
    """Translate --model and all that belongs to it.

    Raises ConfigError for a model that can't be trained here: any command would train another one.
    """
    keys, name = command.keys, command.text("--model").removeprefix("timm/")
    weights = f"timm:{name}"
    if shape := PRESET.fullmatch(name):
        keys["model"] = f"{shape[1]}_{shape[2]}"
    elif command.deit and (shape := DEIT_V2.fullmatch(name)):
        keys |= {"model": f"{shape[1]}_{shape[2]}", "model.layer_scale": "1e-4"}
    elif name in choices("model"):
        keys["model"] = name
    else:
        known = command.timm().model_keys(name)
        weights = known["weights"]
        keys["model"], changed = _nearest_preset("deit" if name.startswith("deit") else "vit", known)
        for key, value in changed.items():
            keys.setdefault(key, value)
        if "distilled" in name:
            command.notes.append("differs: the distillation token is a register; it has no head of its own")
    if not keys["model"].startswith("deepvit"):
        keys["attn"] = "self"
    _shape_keys(command)
    _interpolation(command)
    if command.has("--pretrained"):
        keys["model.weights"] = weights
        command.notes.append(
            f"model.weights={weights} is read from timm's cache; download=true fetches it where it is not"
        )
    if "://" in keys.get("model.weights", ""):
        command.notes.append(f"download {keys['model.weights']} first, and give its path")


def _nearest_preset(kind: str, known: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Return the preset of a model's size, or base, and the keys in which the model differs from it."""
    values: dict[str, Any] = {}
    preset = ""
    for size in ("tiny", "small", "base"):
        preset = f"{kind}_{size}"
        values = plain_from(model_preset(preset).model)
        if all(values[key] == known[key] for key in ("dim", "depth", "heads")):
            break
    changed = {
        f"model.{key}": _text(value)
        for key, value in known.items()
        if key not in OF_FLAGS and _text(values[key]) != _text(value)
    }
    return preset, changed


def _text(value: Any) -> str:
    """Return a value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)


def _shape_keys(command: Command) -> None:
    keys = command.keys
    if pixels := command.text("--input-size") or command.text("--img-size"):
        keys["model.image_size"] = pixels
    pool = command.text("--gp")
    if pool in POOLS:
        keys["model.pool"] = POOLS[pool]
    elif pool:
        command.missing(f"--gp {pool}", "--gp avg or token")
    for keyword in command.words("--model-kwargs"):
        word, _, value = keyword.partition("=")
        key = f"model.{KEYWORDS.get(word, word)}"
        if key in flat_values(compose_tree("train", [])):
            keys[key] = value
            command.told.add(key)
        else:
            command.missing(f"--model-kwargs {keyword}", "a key of model in deepvit-train --help")


def _interpolation(command: Command) -> None:
    keys, trained = command.keys, command.text("--train-interpolation")
    if wanted := command.text("--interpolation"):
        keys["model.interpolation"] = wanted
    evaluated = keys.get("model.interpolation", "bicubic")
    if command.has("--no-aug"):
        return  # timm then takes the interpolation of evaluations
    keys["augment.random_interpolation"] = str(trained == "random").lower()
    if trained not in ("random", evaluated):
        command.notes.append(f"differs: training images are resized as {evaluated}, not {trained}")
