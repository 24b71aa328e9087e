"""The precision that a model computes in."""

from __future__ import annotations

import torch

from deepvit_train.config.recipe import Precision

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Return torch's autocast for a precision; for fp32 it does nothing."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != Precision.fp32)
