"""Measure attention collapse by pure functions of attention maps and features.

docs/decisions/0008-measuring-collapse.md explains the definitions and their traps.

Shapes: L layers, B images, H heads, N tokens, D dim. A map is (N queries, N keys).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor

from deepvit_train.config.collapse import Axis, Metric

# Singular values below this share of the largest do not count towards a map's rank.
RANK_TOLERANCE = 1e-3


def unit_vectors(maps: Tensor, axis: Axis, metric: Metric) -> Tensor:
    """Return the vectors that similarities compare, scaled to length 1. (B, H, N, N), float32.

    u[b, h, t] = A[b, h, :, t] / |A[b, h, :, t]| for columns; for rows it is the same of A[b, h, t, :]. The
    centred metric subtracts the mean of each row first: 1/N for softmax maps, about 0 for maps after a
    BatchNorm. A vector that vanishes stays 0, and so its cosines are 0: a uniform map has no centred
    direction.
    """
    maps = maps.float()
    # Rounding leaves a few units in the last place of a typical entry where a vector vanishes.
    floor = 8 * torch.finfo(torch.float32).eps * reduce(maps.abs(), "... n m -> ... 1 1", "mean")
    if metric == Metric.centred:
        maps = maps - maps.mean(dim=-1, keepdim=True)
    if axis == Axis.column:
        maps = maps.transpose(-2, -1)
    length = maps.norm(dim=-1, keepdim=True)
    return torch.where(length > floor * maps.shape[-1] ** 0.5, maps / length.clamp(min=1e-30), 0.0)


def map_similarity(first: Tensor, second: Tensor, axis: Axis, metric: Metric) -> Tensor:
    """Return the cosines between the maps of two blocks, head by head: M[h, t] of Eq. 2. -> (B, H, N).

    Args:
        first, second: (B, H, N, N), maps of two blocks for the same images.
        axis: what is compared: columns or rows.
        metric: whether the uniform part counts.

    Source: arXiv 2103.11886, Eq. 2, where the vector is a column: the weights of one key over all queries.
    """
    return (unit_vectors(first, axis, metric) * unit_vectors(second, axis, metric)).sum(dim=-1)


def similarity_matrix(maps: Sequence[Tensor], axis: Axis, metric: Metric) -> Tensor:
    """Return the map similarity of every pair of blocks, averaged over heads, vectors and images.

    Args:
        maps: the maps (B, H, N, N) of each of L blocks.
        axis, metric: as in `map_similarity`.

    Returns:
        (L, L), float64.
    """
    images, heads, tokens, _ = maps[0].shape
    total = torch.zeros(len(maps), len(maps), dtype=torch.float64)
    # One image at a time: memory might not hold a second copy of all maps of the batch.
    for image in range(images):
        units = torch.stack([unit_vectors(layer[image], axis, metric).flatten() for layer in maps])
        total += (units @ units.T).double().cpu()
    return total / (images * heads * tokens)


def similar_blocks(similarity: Tensor, threshold: float, k: int) -> Tensor:
    """Find the blocks that are similar to those before them. (L, L) -> (L,), bool.

    Block p is similar if its mean similarity to the k blocks before it (to all p of them if p < k) exceeds
    the threshold. The first block never is, so that the ratio of similar blocks is their count over L - 1.

    This is not the paper's ratio: its mark of 90 % is one of `ratio_of_vectors`.
    """
    found = torch.zeros(len(similarity), dtype=torch.bool)
    for block in range(1, len(similarity)):
        found[block] = similarity[block, max(0, block - k) : block].mean() > threshold
    return found


def ratio_of_vectors(maps: Sequence[Tensor], axis: Axis, metric: Metric, k: int) -> Tensor:
    """Return the share of a block's vectors that are more similar than the nearest k blocks are on average.

    For block p and an image it is the share of h, t with

        M[p, p - 1][h, t] > mean of M[p, q][h', t'] over h', t' and the k blocks q nearest to p

    where M is `map_similarity`. Of two blocks equally near, the earlier one counts first. The result is the
    mean over images.

    Args:
        maps: the maps (B, H, N, N) of each of L blocks.
        axis, metric: as in `map_similarity`.
        k: how many blocks the average is over; all others if there are fewer.

    Returns:
        (L - 1,), float64: the shares of blocks 1 to L - 1.

    Source: arXiv 2103.11886, caption of figure 3: "the ratio of token-wise attention vectors with similarity
    larger than the average similarity within nearest k transformer blocks", which is above 90 % after the
    17th of 32 blocks. The paper does not state k, nor with which block a vector is compared.
    """
    shares = []
    for block in range(1, len(maps)):
        others = sorted(set(range(len(maps))) - {block}, key=lambda other: (abs(other - block), other))
        near = [map_similarity(maps[block], maps[other], axis, metric) for other in others[:k]]
        average = reduce(torch.stack(near).double(), "k b h t -> b 1 1", "mean")
        own = near[0]  # the block before is the first of the nearest
        shares.append((own.double() > average).double().mean())
    return torch.stack(shares).cpu() if shares else torch.zeros(0, dtype=torch.float64)


def deviation(maps: Tensor) -> Tensor:
    """Return how far maps (B, H, N, N) are from uniform rows: |A - 1/N|, averaged. -> (H,), float64.

    It is the mean over queries and images of the length of a row less its mean, from 0 for the uniform map to
    nearly 1 for a softmax map that looks at one key. A centred cosine means little where it is near 0.
    """
    maps = maps.double()
    rows = (maps - maps.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return reduce(rows, "b h n -> h", "mean").cpu()


def similar_ratio(similar: Tensor) -> float:
    """Return the share of similar blocks among those that can be similar. (L,), bool -> from 0 to 1."""
    return float(similar.sum()) / max(1, len(similar) - 1)


def head_similarity(maps: Tensor, axis: Axis, metric: Metric) -> Tensor:
    """Return the similarity of one block's heads, averaged over vectors and images.

    (B, H, N, N) -> (H, H), float64.

    Source: arXiv 2103.11886, section 4.1, which finds it below 0.3 and builds re-attention on that.
    """
    images, _, tokens, _ = maps.shape
    units = rearrange(unit_vectors(maps, axis, metric), "b h t n -> h (b t n)")
    return (units @ units.T).double().cpu() / (images * tokens)


def feature_similarity(features: Sequence[Tensor]) -> Tensor:
    """Return the cosine of a token's features between every pair of blocks, averaged over tokens and images.

    L times (B, N, D) -> (L, L), float64. The last column compares with the last block, and the diagonal
    beside the main one compares neighbours.

    Source: arXiv 2103.11886, figures 4 and 7.
    """
    images, tokens, _ = features[0].shape
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    for image in range(images):
        units = torch.stack([_unit(layer[image].float()).flatten() for layer in features])
        total += (units @ units.T).double().cpu()
    return total / (images * tokens)


def token_similarity(features: Tensor) -> float:
    """Return the mean cosine between two different tokens of one image: 1 if all are alike. Takes (B, N, D).

    It is (|sum_i u[i]|^2 - sum_i |u[i]|^2) / (N (N - 1)) for features u of length 1.
    """
    units = _unit(features.double())
    tokens = features.shape[1]
    pairs = units.sum(dim=1).square().sum(dim=-1) - units.square().sum(dim=(1, 2))
    return float(pairs.mean()) / max(1, tokens * (tokens - 1))


def off_diagonal_mean(matrix: Tensor) -> float:
    """Return the mean of a square matrix without its diagonal. It is 1.0 for a single head or block."""
    size = len(matrix)
    return float((matrix.sum() - matrix.trace()) / (size * (size - 1))) if size > 1 else 1.0


def entropy(maps: Tensor) -> Tensor:
    """Return the entropy of a query's weights in nats, averaged over queries and images. -> (H,).

    It is -sum_j A[i, j] log A[i, j], from 0 to log N. The maps (B, H, N, N) must be softmax maps: rows of
    other maps are no distributions.
    """
    return reduce(torch.special.entr(maps.double()).sum(dim=-1), "b h n -> h", "mean").cpu()


def attention_distance(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return how far a patch looks, in patches, averaged over patches and images. -> (H,).

    It is sum_j A[i, j] |place(i) - place(j)| over patches, with weights scaled to sum to 1 over patches.

    Args:
        maps: (B, H, N, N), softmax maps.
        grid: rows and columns of patches. The last rows * columns tokens are patches; others do not count.

    Source: arXiv 2010.11929, figure 7 (mean attention distance).
    """
    height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).to(maps.device, torch.float64)
    distances = torch.cdist(places, places)
    patches = maps[..., -height * width :, -height * width :].double()
    weights = patches / patches.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return reduce((weights * distances).sum(dim=-1), "b h n -> h", "mean").cpu()


def rank(maps: Tensor, tolerance: float = RANK_TOLERANCE) -> Tensor:
    """Return the numerical rank of maps (B, H, N, N), averaged over images. -> (H,).

    It is the number of singular values above tolerance * the largest.
    """
    values = torch.linalg.svdvals(maps.double())
    counted = (values > tolerance * values[..., :1]).double().sum(dim=-1)
    return reduce(counted, "b h -> h", "mean").cpu()


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True).clamp(min=1e-30)
