"""What a run or a measurement ran on: versions, machine, GPU, and the git revision of the code."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import deepvit_train

PACKAGES = ("torch", "torchvision", "timm", "hydra-core", "numpy", "pillow", "safetensors", "triton")
SOURCES = ("data", "models", "training")  # folders of the package whose code decides what a step computes
NAMED = 3  # changed files that are named


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Describe where a run runs: the command, versions, the machine, the git revision of the code."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "deepvit-train": deepvit_train.__version__,
        "git": _git_revision(),
        "packages": {package: found for package in PACKAGES if (found := _version_of(package)) is not None},
        "host": platform.node(),
        "platform": platform.platform(),
        "world_size": world_size,
        **describe_machine(device),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe what the speed depends on: the processor, or the GPU with its driver and libraries."""
    machine = {
        "device": str(device),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_mib": properties.total_memory // 2**20,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return machine


def describe_rounding(device: torch.device, world_size: int) -> dict[str, Any]:
    """Describe what the rounding of sums depends on. With other values a run has other bits.

    The number of threads is the real one, whoever chose it.
    """
    rounding = {"ranks": world_size, "device": "cpu", "torch": torch.__version__}
    if device.type == "cpu":
        own = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
        return rounding | own
    return rounding | {"device": torch.cuda.get_device_properties(device).name}


def told_of_rounding(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say in one line what changed of it since a checkpoint; None if nothing did, or if it is not known."""
    changed = [
        f"{name}={before[name]} (now {now[name]})"
        for name in sorted(before.keys() & now.keys())
        if before[name] != now[name]
    ]
    return f"{', '.join(changed)}: results round differently" if changed else None


@cache  # what a process has imported stays as it was
def describe_source() -> dict[str, str]:
    """Return the first 12 digits of the SHA-256 of each file that decides what a step computes, by its path.

    These are the modules of SOURCES.
    """
    package = Path(deepvit_train.__file__).resolve().parent
    return {
        str(file.relative_to(package.parent)): hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for room in SOURCES
        for file in sorted((package / room).rglob("*.py"))
    }


def told_of_source(before: dict[str, Any], now: dict[str, str]) -> str | None:
    """Say in one line which files changed since a checkpoint; None if none did, or if it is not known.

    A file that is new or gone is not named, because a file that is there in both cases must name it.
    """
    changed = [file for file in sorted(before.keys() & now.keys()) if before[file] != now[file]]
    if not changed:
        return None
    more = f", ... ({len(changed)} files)" if len(changed) > NAMED else ""
    return f"{', '.join(changed[:NAMED])}{more} changed"


def _processor() -> str:
    """The processor's name, of which platform.processor() often knows nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    source = Path(deepvit_train.__file__).resolve().parent
    if not (source.parent / ".git").exists():
        return None
    return _run("git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12")


def _run(*command: str) -> str | None:
    """What a command prints, or None where it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
