"""Measure what a model costs: seconds a step, memory kept for the backward pass, and peak memory.

A step is a forward pass, a mean cross-entropy and a backward pass. The optimizer is not part of it.

Shapes: B batch, C colour channels.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deepvit_train.config.recipe import Precision
from deepvit_train.models.reattention.chunk import free_kept_memory
from deepvit_train.precision import autocast


@dataclass(frozen=True)
class Workload:
    """The images (B, C, height, width) and labels (B,) of a step, and its precision."""

    images: Tensor
    targets: Tensor
    precision: Precision

    def train(self, model: Callable[[Tensor], Tensor]) -> None:
        """Run a forward and a backward pass. The gradients are added to those of the model."""
        self.loss(model).backward()

    def loss(self, model: Callable[[Tensor], Tensor]) -> Tensor:
        """Run the forward pass of a step, and return its loss."""
        with autocast(self.images.device, self.precision):
            logits = model(self.images)
        return F.cross_entropy(logits.float(), self.targets)

    @torch.inference_mode()
    def infer(self, model: Callable[[Tensor], Tensor]) -> None:
        """Run a forward pass without gradients."""
        with autocast(self.images.device, self.precision):
            model(self.images)


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that a call takes, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def saved_bytes(model: nn.Module, workload: Workload) -> int:
    """Return the bytes that the forward pass keeps for the backward pass, without the weights.

    Memory that several tensors share counts once.
    """
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # a tensor that is freed could give its address to another

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        workload.loss(model)
    return sum(sizes.values())


def peak_bytes(function: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes that torch holds at once during a call, on top of what it held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    free_kept_memory()  # so that the call has to allocate it, and it counts
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports a missing GPU on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    held = [event["args"] for event in events if event["name"] == "[memory]"]
    before = held[0]["Total Allocated"] - held[0]["Bytes"]
    return max(each["Total Allocated"] for each in held) - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
