"""Translate what a command line of timm's says of batches, rates, optimizer and schedule."""

from __future__ import annotations

from deepvit_train.config.timm_command import Command
from deepvit_train.error import ConfigError, nearest

# Optimizers of timm that our choice of the same name gives the same arguments.
SAME = ("adamw", "sgd", "lamb", "lion", "nadamw")


def translate_batch(command: Command) -> None:
    of_process, parts = int(command.number("--batch-size")), max(1, int(command.number("--grad-accum-steps")))
    ranks = command.processes * command.machines
    batch = of_process * ranks * parts
    command.keys |= {"trainer.batch_size": str(batch), "trainer.accumulate": str(parts)}
    if batch != of_process:
        told = f"{of_process} x {ranks} processes x {parts} accumulated"
        command.notes.append(f"trainer.batch_size={batch} is of the whole step: {told}")
    if command.machines > 1:
        command.notes.append(f"start it on {command.machines} machines: docs/cluster.md")


def translate_rate(command: Command) -> None:
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


def translate_optimizer(command: Command) -> None:
    keys, name = command.keys, command.text("--opt").lower()
    if (plain := name.removeprefix("fused")) in SAME:  # apex computes the same
        keys["optim"] = plain
    else:
        _check_optimizer(command, name)
        unset = {"optim.betas": "null", "optim.eps": "null"}
        keys |= {"optim.name": name} | {key: keys.get(key, value) for key, value in unset.items()}
    momentum = command.number("--momentum")
    if plain == "sgd" and (momentum != 0.9 or command.has("--momentum")):
        keys["optim.options"] = f"{{momentum:{momentum:g}}}"
    if plain in ("sgd", "lion"):
        keys.pop("optim.eps", None)  # they have none, and timm takes no notice of it


def _check_optimizer(command: Command, name: str) -> None:
    """Raise ConfigError for an optimizer that timm does not have."""
    known, plain = command.timm().optimizers(), name.removeprefix("lookahead_")
    near = nearest(plain, known) or "; nearest: --opt adamw"
    if plain not in known:
        raise ConfigError(f"--opt {name}: timm has no such optimizer{near}")


def translate_schedule(command: Command) -> None:
    name = command.text("--sched")
    _warm_up(command)
    if name == "step":
        command.keys |= {
            "schedule": "step",
            "schedule.decay_epochs": command.text("--decay-epochs"),
            "schedule.decay_rate": command.text("--decay-rate"),
        }
        return
    if name != "cosine":
        command.missing(f"--sched {name}", "schedule=cosine")
    if command.has("--sched"):
        command.keys["schedule"] = "cosine"


def _warm_up(command: Command) -> None:
    """Shorten a warm-up that is as long as the run: half of the run, as the default here would be."""
    warmup, epochs = command.number("--warmup-epochs"), int(command.keys["trainer.epochs"])
    if warmup < epochs:
        return
    start, rate = command.number("--warmup-lr"), float(command.keys["optim.lr"])
    last = start + (epochs - 1) * (rate - start) / warmup
    command.keys["schedule.warmup_epochs"] = f"{epochs / 2:g}"
    command.told.add("schedule.warmup_epochs")
    command.notes.append(
        f"differs: timm would still warm up at the end after {epochs}, at a rate of {last:.3g}; here the "
        f"warm-up takes half of the run, and the rate reaches {rate:.3g}"
    )
