"""Normalise mixed maps chunk by chunk: X = norm(M) in the forward pass, dM from dX in the backward pass.

The output is out = (weight X + shift) v. dX is the gradient of X, and dM that of M.

Shapes: B batch, N tokens, P padded tokens, H heads, K head_dim; in a chunk C images and R rows (queries).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from deepvit_train.models.reattention.chunk import Chunks


@dataclass(frozen=True)
class Mixing:
    """The mixing and the norm as the operator takes them. All tensors are of the type to compute in.

    Args:
        theta: (H, H), rows are input heads and columns output heads.
        bias: (H,), added to the mixed maps; or None.
        weight, shift: (H,), the affine part of the norm.
        norm: a key of NORMS.
        eps: what is added to the variance.
    """

    theta: Tensor
    bias: Tensor | None
    weight: Tensor
    shift: Tensor
    norm: str
    eps: float


class NoNorm:
    """X = M: nothing is normalised.

    BatchNorm with running statistics is such a case, because they are part of weight and shift.
    """

    def __init__(self, mixing: Mixing, chunks: Chunks) -> None:
        self.mixing, self.chunks = mixing, chunks
        self.theta, self.bias = mixing.theta, mixing.bias
        self.dthetas: list[Tensor] = []
        self.dbiases: list[Tensor] = []

    def observe(self, m: Tensor, spare: Tensor) -> None:
        """Normalise one chunk of the forward pass in place, as far as that is possible before the last chunk.

        `finish` gives the rest. `spare` is memory of the size of m.
        """
        self.normalise(m, spare)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return slope, shift, mean and variance, after the last chunk of the forward pass.

        With slope and shift (H,), out = slope * (observed maps @ v) + shift * (sum of v over tokens). The
        backward pass needs the mean and the variance (H,); they are empty where it needs none.
        """
        empty = self.theta.new_empty
        return self.mixing.weight, self.mixing.shift, empty(0), empty(0)

    def prepare_backward(
        self, statistics: tuple[Tensor, Tensor], dout: Tensor, out: Tensor, v: Tensor
    ) -> Tensor:
        """Take the statistics from `finish` before the first chunk of the backward pass.

        Returns the values (B, H, N, K) to use for v in dX = weight dout v^T.
        """
        return v

    def normalise(self, m: Tensor, spare: Tensor) -> None:
        """Turn M into X in place, for one chunk of the backward pass."""
        if self.bias is not None:
            m.add_(self.chunks.over_keys(self.bias))

    def differentiate(self, dx: Tensor, x: Tensor, spare: Tensor) -> None:
        """Turn dX into dM in place. x is what `normalise` made last."""

    def collect(self, dm: Tensor, maps: Tensor) -> None:
        """Add this chunk's part to the gradients of Theta and bias."""
        self.dthetas.append(torch.bmm(maps.flatten(2), dm.flatten(2).mT))
        if self.bias is not None:
            self.dbiases.append(dm.sum((2, 3)))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients of Theta (H, H) and bias (H,). That of a bias without effect is 0."""
        return _total(self.dthetas, self.theta), _total(self.dbiases, self.mixing.weight)


class OverHeads(NoNorm):
    """LayerNorm across heads at each query and key.

    Theta and bias are centred over output heads first. So the mean of M over heads is 0, and only the
    variance has to be computed. The gradients of Theta and bias are centred in the same way.
    """

    def __init__(self, mixing: Mixing, chunks: Chunks) -> None:
        super().__init__(mixing, chunks)
        self.theta = mixing.theta - mixing.theta.mean(dim=1, keepdim=True)
        self.bias = None if mixing.bias is None else mixing.bias - mixing.bias.mean()
        self.inverse = self.theta  # set by normalise: 1 / standard deviation over heads, (C, 1, R, P)

    def normalise(self, m: Tensor, spare: Tensor) -> None:
        super().normalise(m, spare)
        var = torch.mul(m, m, out=spare).sum(1, keepdim=True).div_(self.chunks.heads)
        self.inverse = var.add_(self.mixing.eps).rsqrt_()
        m.mul_(self.inverse)

    def differentiate(self, dx: Tensor, x: Tensor, spare: Tensor) -> None:
        along = torch.mul(dx, x, out=spare).sum(1, keepdim=True).div_(self.chunks.heads)
        dx.addcmul_(x, along, value=-1).mul_(self.inverse)

    def gradients(self) -> tuple[Tensor, Tensor]:
        dtheta, dbias = super().gradients()
        return dtheta - dtheta.mean(dim=1, keepdim=True), dbias - dbias.mean()


class OverBatch(NoNorm):
    """BatchNorm with the batch's own statistics, over images, queries and keys. The bias cancels.

    The mean of a softmax map is 1/N, so each chunk of M can be centred at once. The standard deviation is
    known only after the last chunk, but it is one factor for a whole head, so `finish` puts it into the
    slope. The backward pass needs mean(dX X) before its first chunk and takes it from the output:
    sum_ij dX_ij X_ij = weight sum_i dout_i (X v)_i.
    """

    def __init__(self, mixing: Mixing, chunks: Chunks) -> None:
        super().__init__(mixing, chunks)
        self.bias = None
        self.count = chunks.batch * chunks.tokens**2 * self.ranks()
        self.center = mixing.theta.sum(0) / chunks.tokens
        self.center_maps = chunks.over_keys(self.center)
        self.norms: list[Tensor] = []
        self.sums: list[Tensor] = []

    def observe(self, m: Tensor, spare: Tensor) -> None:
        self.norms.append(torch.linalg.vector_norm(m.sub_(self.center_maps).flatten(2), dim=2))
        if self.chunks.generator:  # without dropout the sum is 0
            self.sums.append(m.sum((2, 3)))

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = _total([each.double() for each in self.sums], self.center.double())
        squares = torch.cat(self.norms).double().square().sum(0)
        rest, square = self.over_ranks(torch.stack([total, squares])) / self.count
        var, rest = (square - rest**2).to(self.center), rest.to(self.center)
        slope = self.mixing.weight * (var + self.mixing.eps).rsqrt()
        return slope, self.mixing.shift - slope * rest, self.center + rest, var

    def prepare_backward(
        self, statistics: tuple[Tensor, Tensor], dout: Tensor, out: Tensor, v: Tensor
    ) -> Tensor:
        mean, var = statistics
        self.deviation = (var + self.mixing.eps).sqrt()
        self.theta = self.mixing.theta / self.deviation
        self.center_maps = self.chunks.over_keys(mean / self.deviation)
        both = (v.sum(2) * dout.sum(2)).sum((0, 2))
        along = (dout * out).sum((0, 2, 3)) - self.mixing.shift * both
        both, along = self.over_ranks(torch.stack([both, along]))
        self.along = per_head(along / self.count)
        self.dx_mean = self.chunks.over_keys(self.mixing.weight * both / self.count)
        # Without dropout the rows of maps sum to 1, so centring v over tokens centres dX: nothing is left to
        # subtract in `differentiate`.
        return v if self.chunks.generator else v - v.mean(2, keepdim=True)

    def ranks(self) -> int:
        """Return the number of processes whose batches the statistics cover."""
        return 1

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Add up the sums of those processes."""
        return sums

    def normalise(self, m: Tensor, spare: Tensor) -> None:
        m.sub_(self.center_maps)

    def differentiate(self, dx: Tensor, x: Tensor, spare: Tensor) -> None:
        dx.addcmul_(x, self.along, value=-1)
        if self.chunks.generator:
            dx.sub_(self.dx_mean)

    def gradients(self) -> tuple[Tensor, Tensor]:
        dtheta, dbias = super().gradients()
        return dtheta / self.deviation, dbias


class OverRanks(OverBatch):
    """BatchNorm with the statistics of all ranks' batches, which are of one size."""

    def ranks(self) -> int:
        return distributed.get_world_size()

    def over_ranks(self, sums: Tensor) -> Tensor:
        distributed.all_reduce(sums)
        return sums


NORMS: dict[str, type[NoNorm]] = {"none": NoNorm, "layer": OverHeads, "batch": OverBatch, "ranks": OverRanks}


def per_head(value: Tensor) -> Tensor:
    """Reshape (H,) to (H, 1, 1)."""
    return value[:, None, None]


def _total(parts: list[Tensor], like: Tensor) -> Tensor:
    """Return the sum of (C, ...) tensors over chunks and images, 0 if there are none."""
    return torch.cat(parts).sum(0) if parts else torch.zeros_like(like)
