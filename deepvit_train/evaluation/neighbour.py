"""Classify features by the classes of their nearest neighbours among known ones.

The protocol is that of DINO (Caron et al., arXiv 2104.14294, appendix F.1): each of the k nearest known
features, by cosine, votes for its class with the weight exp(cosine / T), where T is 0.07.

Shapes: B features to classify, M known ones, D dim, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEIGHBOURS = (10, 20, 100)
TEMPERATURE = 0.07
CHUNK = 65_536  # known features whose cosines are in memory at a time


def classify_by_neighbours(
    features: Tensor,
    known: Tensor,
    targets: Tensor,
    classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    chunk: int = CHUNK,
) -> list[Tensor]:
    """Return the class of each feature, (B,) int64, for each number of neighbours.

    Args:
        features: (B, D), each of length 1.
        known: (M, D), each of length 1.
        targets: classes of the known features, (M,), int64.
        classes: C.
        neighbours: numbers of neighbours, none of them above M.
        chunk: known features whose cosines are in memory at a time; B x chunk numbers.
    """
    most = max(neighbours)
    cosines = features.new_empty(len(features), 0)
    labels = targets.new_empty(len(features), 0)
    for start in range(0, len(known), chunk):
        end = start + chunk
        near = torch.cat([cosines, features @ known[start:end].T], dim=1)
        near_labels = torch.cat([labels, targets[start:end].expand(len(features), -1)], dim=1)
        cosines, places = near.topk(min(most, near.shape[1]), dim=1)
        labels = near_labels.gather(1, places)
    # A cosine is 1 at most, so no weight overflows.
    weights = ((cosines - 1) / TEMPERATURE).exp()
    votes = []
    for count in neighbours:
        counted = weights.new_zeros(len(features), classes)
        votes.append(counted.scatter_add_(1, labels[:, :count], weights[:, :count]).argmax(dim=1))
    return votes
