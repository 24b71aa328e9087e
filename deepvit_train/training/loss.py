"""What is minimised: cross-entropy, binary cross-entropy or focal loss, with weights of classes.

Each is a mean over images, so that micro-batches and ranks add up to one batch. With weights, an image counts
by the weight of its class.

Shapes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit_train.config.loss import LossConfig, LossName


@dataclass(frozen=True)
class Criterion:
    """A loss of logits and targets.

    Args:
        weights: (C,) of the classes, or None for equal ones.
        gamma: of the focal loss.
        threshold: soft targets above it count as 1 in binary cross-entropy; None: they stay soft.
    """

    name: LossName
    weights: Tensor | None
    gamma: float
    threshold: float | None

    def __call__(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Return the mean over images.

        Args:
            logits: (B, C), in single precision.
            targets: (B,), classes, or (B, C), mixed and smoothed.
            smoothing: of targets that are classes.
        """
        if self.name == LossName.cross_entropy:
            losses = F.cross_entropy(
                logits, targets, weight=self.weights, label_smoothing=smoothing, reduction="none"
            )
            return losses.mean()
        shares = _shares(targets, logits.shape[1], smoothing)
        if self.name == LossName.focal:
            return self._focal(logits, shares).mean()
        return self._binary(logits, shares).mean()

    def _focal(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return (B,): -sum over c of w_c t_c (1 - p_c)^gamma log p_c (Lin et al., by softmax)."""
        log_p = logits.log_softmax(dim=1)
        losses = -shares * (-torch.expm1(log_p)).clamp(min=1e-8) ** self.gamma * log_p
        return (losses if self.weights is None else losses * self.weights).sum(dim=1)

    def _binary(self, logits: Tensor, shares: Tensor) -> Tensor:
        """Return (B,): the mean over classes, times the weight of the image's classes by their shares."""
        marks = shares if self.threshold is None else (shares > self.threshold).to(shares.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, marks, reduction="none").mean(dim=1)
        return losses if self.weights is None else losses * (shares @ self.weights)


def _shares(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return the share (B, C) that each class has of each target. They add up to 1."""
    if targets.is_floating_point():
        return targets
    return F.one_hot(targets, classes).float() * (1 - smoothing) + smoothing / classes


def build_criterion(
    loss: LossConfig, weights: Sequence[float] | None, device: torch.device
) -> Criterion | None:
    """Build the loss, or None for plain cross-entropy, which torch computes by itself."""
    if loss.name == LossName.cross_entropy and weights is None:
        return None
    placed = None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)
    return Criterion(loss.name, placed, loss.focal_gamma, loss.target_threshold)
