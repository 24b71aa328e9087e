"""Translate what a command line of timm's or DeiT's says of a teacher."""

from __future__ import annotations

from deepvit_train.config.timm_command import Command


def translate_distillation(command: Command) -> None:
    (_of_deit if command.deit else _of_timm)(command)


def _of_timm(command: Command) -> None:
    """timm adds task_weight * task + distill_weight * T^2 KL; both weights are 1 unless they are given."""
    name = command.text("--kd-model-name")
    if not name:
        return
    if (kind := command.text("--kd-distill-type")) != "logit":
        command.missing(f"--kd-distill-type {kind}", "training without a teacher")
        return
    if (loss := command.text("--kd-loss-type")) != "kl":
        command.missing(f"--kd-loss-type {loss}", "distill.kind=soft, by the KL divergence")
    ours, theirs = (command.text(f"--{part}-loss-weight") for part in ("task", "distill"))
    task = command.number("--task-loss-weight") if ours else 1.0
    teacher = command.number("--distill-loss-weight") if theirs else 1.0 - task if ours else 1.0
    if teacher <= 0 or task < 0:
        command.missing(f"--kd-model-name {name}", "training without a teacher: its weight is not above 0")
        return
    _teach(command, name, "soft", teacher / (task + teacher), command.text("--kd-temperature"))
    if task + teacher != 1:
        command.notes.append(
            f"differs: the weights of timm's loss add up to {task + teacher:g}; it is larger by that factor"
        )


def _of_deit(command: Command) -> None:
    kind = command.text("--distillation-type")
    if kind in ("", "none"):
        return
    name = command.text("--teacher-model")
    share = command.number("--distillation-alpha")
    _teach(command, name, kind, share, command.text("--distillation-tau"))
    path = command.text("--teacher-path")
    if "://" in path:
        command.notes.append(f"--teacher-path {path}: nothing is fetched from there")
    elif path:
        command.keys["distill.file"] = path
    command.notes.append(
        "differs: DeiT's distillation token learns from the teacher; here the class token does"
    )
    if kind == "soft":
        command.notes.append("differs: DeiT divides its soft loss by the number of classes as well")


def _teach(command: Command, name: str, kind: str, share: float, temperature: str) -> None:
    command.keys |= {
        "distill.teacher": f"timm:{name}",
        "distill.kind": kind,
        "distill.share": f"{share:g}",
    }
    if kind == "soft" and temperature:
        command.keys["distill.temperature"] = temperature
    command.notes.append(
        f"the teacher's weights must be in timm's cache; download=true fetches them, distill.file=FILE names "
        f"a file of {name}"
    )
