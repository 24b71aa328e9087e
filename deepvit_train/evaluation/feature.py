"""Features of images at every depth of a model: the class token and the mean of the patch tokens.

Shapes: L layers, T kinds of token, B images of a batch, M images that are kept, D dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from deepvit_train.console import counted
from deepvit_train.data.dataset import Batch
from deepvit_train.error import NotFiniteError
from deepvit_train.models.walk import Walk

CLASS_TOKEN = "class_token"
MEAN_PATCH = "mean_patch"


def token_kinds(walk: Walk) -> list[str]:
    """Return the kinds of token that a model has. Without a class token it has the mean of patches alone."""
    return [CLASS_TOKEN, MEAN_PATCH] if walk.has_class_token else [MEAN_PATCH]


@torch.no_grad()
def features_of(walk: Walk, images: Tensor) -> Tensor:
    """Return the features that leave each block. (B, 3, height, width) -> (L, T, B, D), float32.

    Each block's tokens go through the model's final norm, where it is one of tokens, so those of the last
    block are what the classifier reads. Raises NotFiniteError if one of them is NaN or infinite.
    """
    layers = []
    for tokens in walk.outcomes(images):
        patches = tokens[:, walk.prefix :].mean(dim=1)
        layers.append(torch.stack([tokens[:, 0], patches] if walk.has_class_token else [patches]))
    found = torch.stack(layers).float()
    if not found.isfinite().all():
        bad = ~found.isfinite().flatten(1).all(dim=1)
        raise NotFiniteError(f"the features that leave block {int(bad.nonzero()[0])} are NaN or infinite")
    return found


@dataclass(frozen=True)
class FeatureBank:
    """The features of the images that neighbours are looked for among, and that a linear probe is fitted to.

    Args:
        features: (L, T, M, D), float32, on the model's device.
        targets: the class of each image (M,), int64.
    """

    features: Tensor
    targets: Tensor


def fill_bank(walk: Walk, batches: Iterable[Batch], images: int) -> FeatureBank:
    """Keep the features of `images` images. Memory holds them once: L x T x M x D numbers of 4 bytes."""
    features, targets, start = None, [], 0
    with counted(batches, "features of training images") as shown:
        for batch in shown:
            found = features_of(walk, batch.images)
            if features is None:
                layers, kinds, _, dim = found.shape
                features = found.new_empty(layers, kinds, images, dim)
            features[:, :, start : start + len(batch.images)] = found
            targets.append(batch.targets)
            start += len(batch.images)
    assert features is not None
    return FeatureBank(features[:, :, :start], torch.cat(targets))
