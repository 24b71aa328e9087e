"""Translate a command line of timm's train.py, or of DeiT's main.py, into one of deepvit-train."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deepvit_train.config.compose import compose_command, compose_tree, flat_values
from deepvit_train.config.timm_command import Command, Timm, read_command
from deepvit_train.config.timm_distillation import translate_distillation
from deepvit_train.config.timm_model import translate_model
from deepvit_train.config.timm_optimizer import (
    translate_batch,
    translate_optimizer,
    translate_rate,
    translate_schedule,
)
from deepvit_train.error import ConfigError

WIDTH = 80  # columns of the printed command
# Printed first: what a group's other keys are the differences from.
CHOSEN = ("data", "data.root", "model", "attn", "augment", "optim", "optim.options", "schedule", "loss")
# Always printed, even where a value is the default.
TOLD = ("trainer.batch_size", "trainer.epochs", "optim.lr")


def from_timm(arguments: Sequence[str], timm: Callable[[], Timm]) -> str:
    """Return our command for a command line of timm's, after comment lines on what differs or is missing.

    Args:
        arguments: the command line, as one text or in words: './distributed_train.sh 8 /data --model ...'
        timm: gives what timm knows of models and optimizers; called only where it is needed.

    Raises ConfigError for what can't be read, or can't be used here.
    """
    command = read_command(arguments, timm)
    for translate in (
        _copies,
        _place,
        translate_model,
        translate_batch,
        translate_rate,
        translate_optimizer,
        translate_schedule,
        _loss,
        translate_distillation,
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
    told = {*chosen, *TOLD, *_keys_of_typed(command, keys)}
    kept = [f"{key}={value}" for key, value in keys.items() if key in told or ours[key] != base[key]]
    many = f"torchrun --nproc-per-node={command.processes} -m deepvit_train.cli train"
    program = many if command.processes * command.machines > 1 else "deepvit-train"
    notes = [*command.notes, "--cfg at the end prints every key and its value, and trains nothing"]
    return "\n".join([*(f"# {note}" for note in notes), *_wrapped(program, map(shlex.quote, kept))])


def _keys_of_typed(command: Command, keys: dict[str, str]) -> set[str]:
    """Return the keys that typed flags set, to be printed even where a value is the default.

    Flags that were typed and set none are noted.
    """
    told, idle = set(command.told), []
    for name in command.typed:
        here = command.flags[name].here
        found = {part.partition("=")[0] for part in here.removeprefix("~ ").split(", ")}
        told |= found
        if here.startswith("~") and not found & {*keys, "torchrun", "model.KEY"}:
            idle.append(name)
    said = " ".join(name for name in idle if not any(name in note for note in command.notes))
    if said:
        command.notes.append(f"without effect, in timm too: {said}")
    return told


def _wrapped(program: str, words: Iterator[str]) -> Iterator[str]:
    """Yield the lines of a command, which end in a backslash but for the last one."""
    line = program
    for word in words:
        if len(line) + len(word) + len("  \\") > WIDTH:
            yield f"{line} \\"
            line = f"    {word}"
        else:
            line += f" {word}"
    yield line


def _copies(command: Command) -> None:
    """Translate the flags whose value is taken as it is, and note those that are missing or not needed."""
    idle: list[str] = []
    same: list[str] = []
    for name, flag in command.flags.items():
        words, typed = command.words(name), name in command.typed
        if flag.here == "-":
            idle += [name] if typed else []
        elif flag.here == "!":
            if typed and (flag.values == "0" or not _equal(shlex.join(words), flag.default)):
                command.missing(shlex.join([name, *words]), flag.note)
            elif typed:
                same.append(shlex.join([name, *words]))
        elif not flag.here.startswith("~") and (words or typed):
            value = "true" if flag.values == "0" else words[-1]
            command.keys[flag.here] = f"[{','.join(words)}]" if flag.values == "+" else value
    if idle:
        command.notes.append(f"not needed: {' '.join(idle)}")
    if same:
        command.notes.append(f"the same here: {' '.join(same)}")
    if command.has("--eval"):
        raise ConfigError("--eval: --from-timm translates trainings\nnearest: deepvit-eval checkpoint=FILE")
    mode = command.text("--clip-mode")
    if command.has("--clip-mode") and mode != "norm" and command.keys.pop("trainer.clip_grad", None):
        command.notes.append(
            f"left out: --clip-grad {command.text('--clip-grad')}, which is for --clip-mode {mode}"
        )


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


def _loss(command: Command) -> None:
    if command.has("--bce-loss"):
        command.keys["loss"] = "bce"
        if threshold := command.text("--bce-target-thresh"):
            command.keys["loss.target_threshold"] = threshold


def _watching(command: Command) -> None:
    if command.has("--log-wandb"):
        command.keys["tracker"] = "wandb"
        command.notes.append("tracker=wandb needs the package: pip install 'deepvit-train[wandb]'")
    metric = command.text("--eval-metric")
    if metric == "loss" or (metric == "top1" and command.has("--eval-metric")):
        command.keys["trainer.select_by"] = metric
    elif metric not in ("", "top1"):
        command.missing(f"--eval-metric {metric}", "trainer.select_by=top1")


def _augment(command: Command) -> None:
    keys, policy = command.keys, command.text("--aa")
    policy = "3a" if command.has("--ThreeAugment") else "" if policy.lower() == "none" else policy
    keys["augment"] = "none" if command.has("--no-aug") else "basic"
    keys |= {f"augment.{name}": command.text(f"--{name}") or "0" for name in ("mixup", "cutmix")}
    repeats = command.number("--aug-repeats")
    if command.deit and not command.has("--no-repeated-aug"):
        repeats = 3
    keys["augment.repeats"] = str(max(1, int(repeats)))
    if keys["augment"] == "none":
        command.notes.append(
            "differs: timm resizes training images to the image size under --no-aug; here model.crop_pct is "
            "cut out of them, as in evaluation"
        )
        return  # timm then varies nothing, and erases nothing
    keys["augment.erase"] = command.text("--reprob")
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
    device = command.text("--device").partition(":")[0]
    if device == "cpu" or command.has("--device"):
        keys["trainer.device"] = device
    averaged = command.has("--model-ema") or (command.deit and not command.has("--no-model-ema"))
    if averaged:
        keys["trainer.ema_decay"] = command.text("--model-ema-decay")
        keys["trainer.ema_warmup"] = str(command.has("--model-ema-warmup")).lower()
