"""Compare the gradients of queries and keys with those of values, block by block.

Shapes: L layers, H heads, K head_dim, D dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepvit_train.distributed.parallel import whole


def query_key_ratio(model: nn.Module) -> Tensor | None:
    """Return |grad W_qk| / |grad W_v| for each block whose attention is trained, or None if there is none.

    W_qk are the rows of the block's `qkv` weight (3 H K, D) that make queries and keys. Where attention maps
    are nearly uniform, the loss hardly depends on them, and the ratio is near 0 (arXiv 2206.03126, section
    3). The ratio does not depend on a loss scale. If gradients are sharded, all ranks must call this.

    -> (L,), float32, on the model's device.
    """
    ratios = []
    for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        if (gradient := block.attn.qkv.weight.grad) is not None:
            *query_key, value = whole(gradient).float().chunk(3)
            ratios.append(torch.cat(query_key).norm() / value.norm().clamp(min=1e-30))
    return torch.stack(ratios) if ratios else None
