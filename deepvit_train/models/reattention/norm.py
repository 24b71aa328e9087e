"""What stands between mixed maps M and values, chunk by chunk: X = norm(M), and dM from dX.

out = (weight X + shift) v, and dX is the gradient of X, that is weight times that of (weight X + shift).
Shapes: B batch, N tokens, P padded tokens, H heads, K head_dim; in a chunk C images and R rows (queries).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from deepvit_train.models.reattention.chunk import Chunks


@dataclass(frozen=True)
class Mixing:
    """What happens to the maps; tensors are of the type to compute in.

    theta: (H, H), rows are input heads; bias (or None), weight, shift: (H,); norm: a key of NORMS.
    """

    theta: Tensor
    bias: Tensor | None
    weight: Tensor
    shift: Tensor
    norm: str
    eps: float


class NoNorm:
    """X = M. BatchNorm by its running statistics is this too, with its own weight and shift."""

    def __init__(self, mixing: Mixing, chunks: Chunks) -> None:
        self.mixing, self.chunks = mixing, chunks
        self.theta, self.bias = mixing.theta, mixing.bias
        self.dthetas: list[Tensor] = []
        self.dbiases: list[Tensor] = []

    def observe(self, m: Tensor, spare: Tensor) -> None:
        """In the forward pass, once a chunk: M -> X in place, but for what `finish` tells to put right."""
        self.normalise(m, spare)

    def finish(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Slope and shift so that out = slope (what observe left) v + shift (sum of v); two statistics."""
        empty = self.theta.new_empty
        return self.mixing.weight, self.mixing.shift, empty(0), empty(0)

    def remember(self, statistics: tuple[Tensor, Tensor], dout: Tensor, out: Tensor, v: Tensor) -> Tensor:
        """Before the backward pass. Returns what stands in for v in dX = weight dout v^T."""
        return v

    def normalise(self, m: Tensor, spare: Tensor) -> None:
        """In the backward pass: M -> X in place."""
        if self.bias is not None:
            m.add_(self.chunks.over_keys(self.bias))

    def differentiate(self, dx: Tensor, x: Tensor, spare: Tensor) -> None:
        """dX -> dM in place, for the X that `normalise` made last."""

    def collect(self, dm: Tensor, maps: Tensor) -> None:
        """Take this chunk's share of the gradients of Theta and bias."""
        self.dthetas.append(torch.bmm(maps.flatten(2), dm.flatten(2).mT))
        if self.bias is not None:
            self.dbiases.append(dm.sum((2, 3)))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of Theta and bias; 0 for a bias that has no effect."""
        return _total(self.dthetas, self.theta), _total(self.dbiases, self.mixing.weight)


class OverHeads(NoNorm):
    """LayerNorm across heads at each query and key.

    With Theta and bias centred over the heads they make, M's mean over heads is 0 and only the variance is
    left; the gradient of the mean falls out with the centring of the gradients of Theta and maps.
    """

    def __init__(self, mixing: Mixing, chunks: Chunks) -> None:
        super().__init__(mixing, chunks)
        self.theta = mixing.theta - mixing.theta.mean(dim=1, keepdim=True)
        self.bias = None if mixing.bias is None else mixing.bias - mixing.bias.mean()
        self.inverse = self.theta  # of the deviation over heads, (C, 1, R, P), in the chunk at hand

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
    """BatchNorm by the batch's own statistics: over images, queries and keys. bias cancels.

    The maps' mean is 1/N, so M is centred as it is made. Its deviation is known after the last chunk only,
    but scales a whole head, and so divides out at the end. The backward pass needs mean(dX X) before its
    first chunk, and has it from out: sum_ij dX_ij X_ij = weight sum_i dout_i (X v)_i.
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

    def remember(self, statistics: tuple[Tensor, Tensor], dout: Tensor, out: Tensor, v: Tensor) -> Tensor:
        mean, var = statistics
        self.deviation = (var + self.mixing.eps).sqrt()
        self.theta = self.mixing.theta / self.deviation
        self.center_maps = self.chunks.over_keys(mean / self.deviation)
        both = (v.sum(2) * dout.sum(2)).sum((0, 2))
        along = (dout * out).sum((0, 2, 3)) - self.mixing.shift * both
        both, along = self.over_ranks(torch.stack([both, along]))
        self.along = per_head(along / self.count)
        self.dx_mean = self.chunks.over_keys(self.mixing.weight * both / self.count)
        # Rows of maps sum to 1 unless dropped: then v less its mean makes dX less what its mean would be.
        return v if self.chunks.generator else v - v.mean(2, keepdim=True)

    def ranks(self) -> int:
        """How many processes' batches the statistics are over."""
        return 1

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Sums over this process's batch -> over the batches of all `ranks`."""
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
    """BatchNorm by the statistics of all ranks' batches, which are of one size."""

    def ranks(self) -> int:
        return distributed.get_world_size()

    def over_ranks(self, sums: Tensor) -> Tensor:
        distributed.all_reduce(sums)
        return sums


NORMS: dict[str, type[NoNorm]] = {"none": NoNorm, "layer": OverHeads, "batch": OverBatch, "ranks": OverRanks}


def per_head(value: Tensor) -> Tensor:
    """(H,) -> (H, 1, 1)."""
    return value[:, None, None]


def _total(parts: list[Tensor], like: Tensor) -> Tensor:
    """The sum over chunks and images of (C, ...) tensors; 0 where there are none."""
    return torch.cat(parts).sum(0) if parts else torch.zeros_like(like)
