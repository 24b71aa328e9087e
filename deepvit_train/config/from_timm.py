"""Translate a command line of timm's train.py, or of DeiT's main.py, into one of deepvit-train."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from deepvit_train.config.compose import compose_command, compose_tree, flat_values
from deepvit_train.config.preset import choices
from deepvit_train.config.timm_command import KEYWORDS, Command, read_command

SHAPE = re.compile(r"(vit|deit)_(tiny|small|base)_patch(\d+)_(\d+|LS)(?:_\w+)?")
POOLS = {"token": "cls", "avg": "mean_patches"}
# Printed first: what a group's other keys are the differences from.
CHOSEN = ("data", "data.root", "model", "augment", "optim", "optim.options", "schedule", "loss")
# Optimizers of timm that our choice of the same name gives the same arguments.
SAME = ("adamw", "sgd", "lamb", "lion", "nadamw")
# Always printed, even where a value is the default.
TOLD = ("trainer.batch_size", "trainer.epochs", "optim.lr")


def from_timm(arguments: Sequence[str]) -> str:
    """Return our command for a command line of timm's, after comment lines on what differs or is missing.

    Args:
        arguments: the command line, as one text or in words: './distributed_train.sh 8 /data --model ...'

    Raises ConfigError for what can't be read, or can't be used here.
    """
    command = read_command(arguments)
    for translate in (
        _copies,
        _place,
        _model,
        _batch,
        _rate,
        _optimizer,
        _schedule,
        _loss,
        _watching,
        _augment,
        _trainer,
    ):
        translate(command)
    chosen = {key: command.keys.pop(key) for key in CHOSEN if key in command.keys}
    keys = chosen | command.keys
    overrides = [f"{key}={value}" for key, value in keys.items()]
    compose_command("train", overrides)
    ours = flat_values(compose_tree("train", overrides))
    base = flat_values(compose_tree("train", overrides[: len(chosen)]))
    kept = [
        f"{key}={value}"
        for key, value in keys.items()
        if key in chosen or key in TOLD or ours[key] != base[key]
    ]
    many = f"torchrun --nproc-per-node={command.processes} -m deepvit_train.cli train"
    program = many if command.processes * command.machines > 1 else "deepvit-train"
    return "\n".join([*(f"# {note}" for note in command.notes), f"{program} {shlex.join(kept)}"])


def _copies(command: Command) -> None:
    """Translate the flags whose value is taken as it is, and note those that are missing or not needed."""
    idle: list[str] = []
    for name, flag in command.flags.items():
        words, typed = command.words(name), name in command.typed
        if flag.here == "-":
            idle += [name] if typed else []
        elif flag.here == "!":
            if typed and (flag.values == "0" or not _equal(shlex.join(words), flag.default)):
                command.missing(shlex.join([name, *words]), flag.note)
        elif not flag.here.startswith("~") and (words or typed):
            value = "true" if flag.values == "0" else words[-1]
            command.keys[flag.here] = f"[{','.join(words)}]" if flag.values == "+" else value
    if idle:
        command.notes.append(f"not needed: {' '.join(idle)}")


def _equal(text: str, default: str) -> bool:
    try:
        return float(text) == float(default)
    except ValueError:
        return text == default


def _place(command: Command) -> None:
    root = command.text("--data-path") or command.text("--data-dir") or command.text("data")
    if not root:
        command.notes.append("the folder of images is not given: write it in the place of DIR")
    kind = command.text("--dataset").lower()
    if kind not in ("", "imagefolder", "folder", "imagetar", "tar"):
        command.missing(f"--dataset {kind}", "data=imagefolder, or data=tar for webdataset's tar files")
    command.keys["data"] = "tar" if "tar" in kind or kind.startswith("wds") else "imagefolder"
    command.keys["data.root"] = root or "DIR"
    if root and (Path(root) / "validation").is_dir() and not (Path(root) / "val").is_dir():
        command.keys.setdefault("data.split", "validation")  # which timm takes first
    if name := command.text("--experiment"):
        command.keys["name"] = name
    if out := command.text("--output_dir") or command.text("--output"):
        command.keys["run_dir"] = out if command.deit else f"{out.rstrip('/')}/${{name}}"


def _model(command: Command) -> None:
    keys, full = command.keys, command.text("--model")
    name = full.split("/")[-1].split(".")[0]
    if shape := SHAPE.fullmatch(name):
        kind, size, patch, pixels = shape.groups()
        keys["model"] = f"{kind}_{size}"
        keys |= {"model.patch_size": patch} | ({"model.layer_scale": "1e-4"} if pixels == "LS" else {})
        keys |= {"model.image_size": pixels} if pixels != "LS" else {}
        keys |= {"model.crop_pct": "1.0"} if pixels == "384" and "model.crop_pct" not in keys else {}
    elif name in choices("model"):
        keys["model"] = name
    else:
        size = next((size for size in ("tiny", "small", "base") if size in name), "small")
        keys["model"] = f"{'deit' if name.startswith('deit') else 'vit'}_{size}"
        command.missing(f"--model {full} is none of our shapes", f"model={keys['model']}")
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
        else:
            command.missing(f"--model-kwargs {keyword}", "a key of model in deepvit-train --help")
    if command.has("--pretrained"):
        keys["model.weights"] = f"timm:{full}"
    if "://" in keys.get("model.weights", ""):
        command.notes.append(f"download {keys['model.weights']} first, and give its path")
    wanted, trained = command.text("--interpolation"), command.text("--train-interpolation")
    if wanted:
        keys["model.interpolation"] = wanted
    if trained == "random":
        keys["augment.random_interpolation"] = "true"
    elif trained != (wanted or "bicubic"):
        command.notes.append(f"differs: training images are resized as {wanted or 'bicubic'}, not {trained}")


def _batch(command: Command) -> None:
    of_process, parts = int(command.number("--batch-size")), max(1, int(command.number("--grad-accum-steps")))
    ranks = command.processes * command.machines
    batch = of_process * ranks * parts
    command.keys |= {"trainer.batch_size": str(batch), "trainer.accumulate": str(parts)}
    if batch != of_process:
        told = f"{of_process} x {ranks} processes x {parts} accumulated"
        command.notes.append(f"trainer.batch_size={batch} is of the whole step: {told}")
    if command.machines > 1:
        command.notes.append(f"start it on {command.machines} machines: docs/cluster.md")


def _rate(command: Command) -> None:
    keys, batch, optimizer = (
        command.keys,
        int(command.keys["trainer.batch_size"]),
        command.text("--opt").lower(),
    )
    rate = command.number("--lr")
    if command.deit and not command.has("--unscale-lr"):
        rate *= batch / 512
    elif not rate:
        root = "sqrt" if "ada" in optimizer or "lamb" in optimizer else "linear"
        power = 0.5 if (command.text("--lr-base-scale") or root) == "sqrt" else 1.0
        rate = command.number("--lr-base") * (batch / command.number("--lr-base-size")) ** power
    keys["optim.lr"] = f"{rate:.6g}"
    prefix = command.number("--warmup-epochs") if command.has("--warmup-prefix") else 0
    keys["trainer.epochs"] = str(int(command.number("--epochs") + prefix))
    if not command.has("--sched-on-updates"):
        command.notes.append("differs: the rate changes with each step, not with each epoch")


def _optimizer(command: Command) -> None:
    keys, name = command.keys, command.text("--opt").lower()
    if (plain := name.removeprefix("fused")) in SAME:  # apex computes the same
        keys["optim"] = plain
    else:
        unset = {"optim.betas": "null", "optim.eps": "null"}
        keys |= {"optim.name": name} | {key: keys.get(key, value) for key, value in unset.items()}
    if plain == "sgd" and (momentum := command.number("--momentum")) != 0.9:
        keys["optim.options"] = f"{{momentum:{momentum:g}}}"
    if plain in ("sgd", "lion"):
        keys.pop("optim.eps", None)  # they have none, and timm takes no notice of it


def _schedule(command: Command) -> None:
    name = command.text("--sched")
    if name == "step":
        command.keys |= {
            "schedule": "step",
            "schedule.decay_epochs": command.text("--decay-epochs"),
            "schedule.decay_rate": command.text("--decay-rate"),
        }
    elif name != "cosine":
        command.missing(f"--sched {name}", "schedule=cosine")


def _loss(command: Command) -> None:
    if command.has("--bce-loss"):
        command.keys["loss"] = "bce"
        if threshold := command.text("--bce-target-thresh"):
            command.keys["loss.target_threshold"] = threshold


def _watching(command: Command) -> None:
    if command.has("--log-wandb"):
        command.keys["tracker"] = "wandb"
    if (metric := command.text("--eval-metric")) == "loss":
        command.keys["trainer.select_by"] = metric
    elif metric not in ("", "top1"):
        command.missing(f"--eval-metric {metric}", "trainer.select_by=top1")


def _augment(command: Command) -> None:
    keys, policy = command.keys, command.text("--aa")
    policy = "3a" if command.has("--ThreeAugment") else "" if policy.lower() == "none" else policy
    keys["augment"] = "none" if command.has("--no-aug") else "basic"
    keys |= {f"augment.{name}": command.text(f"--{name}") or "0" for name in ("mixup", "cutmix")}
    keys["augment.erase"] = command.text("--reprob")
    repeats = command.number("--aug-repeats")
    if command.deit and not command.has("--no-repeated-aug"):
        repeats = 3
    keys["augment.repeats"] = str(max(1, int(repeats)))
    if keys["augment"] == "none":
        return
    jitter = "0" if policy and "3a" not in policy else command.text("--color-jitter")
    keys |= {"augment.flip": command.text("--hflip"), "augment.color_jitter": jitter}
    for flag in ("scale", "ratio"):
        keys[f"augment.crop_{flag}"] = f"[{','.join(command.words(f'--{flag}'))}]"
    if policy:
        keys["augment.auto_augment"] = policy


def _trainer(command: Command) -> None:
    keys = command.keys
    if command.has("--amp", "--apex-amp", "--native-amp") or command.deit:
        keys["trainer.precision"] = "bf16" if command.text("--amp-dtype") == "bfloat16" else "fp16"
    if command.has("--torchcompile"):
        mode = command.text("--torchcompile-mode").replace("-", "_") or "default"
        keys["trainer.compile"] = mode
    if command.text("--device") == "cpu":
        keys["trainer.device"] = "cpu"
    averaged = command.has("--model-ema") or (command.deit and not command.has("--no-model-ema"))
    if averaged:
        keys["trainer.ema_decay"] = command.text("--model-ema-decay")
        keys["trainer.ema_warmup"] = str(command.has("--model-ema-warmup")).lower()
