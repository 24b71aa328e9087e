"""The cosine regulariser keeps the attention maps of consecutive blocks from becoming alike.

Shapes: B batch, H heads, N tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit_train.config.loss import CosineAxis, LossConfig

# The dimension of maps (B, H, N queries, N keys) that a vector runs over.
DIMENSION = {CosineAxis.heads: 1, CosineAxis.queries: 2}


@dataclass(frozen=True)
class CosineRegulariser:
    """weight * mean cosine between the maps of blocks i and i + 1, over the first pairs, images and vectors.

    `heads` is the authors' released code, whose vector at each query and key runs over heads; `queries` is
    the paper's Eq. 2, whose vector for each head and key is a column. Both take the maps that multiply V.
    """

    weight: float
    axis: CosineAxis
    blocks: int  # how many blocks give their maps: one more than there are pairs

    def __call__(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the penalty for maps (B, H, N, N) of consecutive blocks, in float32 at least."""
        dimension = DIMENSION[self.axis]
        pairs = itertools.pairwise(maps)
        with torch.autocast(maps[0].device.type, enabled=False):
            cosines = [F.cosine_similarity(one, other, dim=dimension).mean() for one, other in pairs]
            return self.weight * torch.stack(cosines).mean()


def build_regulariser(loss: LossConfig, depth: int) -> CosineRegulariser | None:
    """Build the regulariser for a model of `depth` blocks, or None if it is off."""
    if not loss.cosine_weight:
        return None
    pairs = min(loss.cosine_pairs or depth, depth - 1)
    return CosineRegulariser(loss.cosine_weight, loss.cosine_axis, pairs + 1)
