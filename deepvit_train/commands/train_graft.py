"""How a plain ViT becomes a DeepViT without a jump: which blocks mix, and norms that undo nothing at first.

With Theta as identity, no bias and no norm, mixed maps are the softmax maps. A BatchNorm with the mean m and
the variance s of a head's softmax maps over training images, weight sqrt(s + eps) and shift m gives them back
as well: (A - m) / sqrt(s + eps) * weight + shift = A.

Shapes: B images, H heads, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import reduce
from torch import Tensor, nn

from deepvit_train.collapse.measure import similar_blocks, similarity_matrix
from deepvit_train.config.collapse import CollapseConfig
from deepvit_train.config.model import ThetaInit, ThetaNorm
from deepvit_train.config.preset import Architecture, attention_preset
from deepvit_train.config.train import TrainConfig
from deepvit_train.data.index import open_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed.agreement import together
from deepvit_train.distributed.world import World
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.models import DeepViT, record_maps, start_from
from deepvit_train.models.attention import ReAttention
from deepvit_train.run.description import read_description
from deepvit_train.run.folder import RunFolder
from deepvit_train.run.found import find

CHUNK = 8  # images whose maps are in memory at a time


@dataclass(frozen=True)
class Graft:
    """What is known of a plain model's softmax maps over some training images.

    Args:
        similarity: of every pair of blocks, as collapse.* says, (blocks, blocks).
        means, variances: of each block's maps, over images, queries and keys: (blocks, H) each.
    """

    similarity: Tensor
    means: Tensor
    variances: Tensor

    @torch.no_grad()
    def start_norms(self, model: DeepViT) -> None:
        """Let each BatchNorm over maps begin as the identity, for maps with these means and variances."""
        for index, block in enumerate(model.blocks):
            attention = block.attn
            if not (isinstance(attention, ReAttention) and isinstance(attention.norm, nn.BatchNorm2d)):
                continue
            norm, mean, variance = attention.norm, self.means[index], self.variances[index]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean)


def settle_graft(
    config: TrainConfig, folder: RunFolder, world: World, say: Callable[[str], None]
) -> Graft | None:
    """Find attn.from_block where it is to be found, and what the norms of a grafted model begin with.

    A run that goes on keeps the block that was found when it began. Returns None where no norm needs a start:
    the run goes on, its weights are not a plain ViT's, or it asks for no identity. All ranks must call this.

    Raises:
        ConfigError: no block's maps are alike.
        CheckpointError, DataError: the weights or the images can't be used.
    """
    attn, automatic = config.attn, config.attn.from_block is None
    if attn.kind == "self":
        return None
    if automatic and (before := together(world, lambda: _block_before(config, folder))) is not None:
        _set(config, world.first(before))
        return None
    identity = attn.theta_init == ThetaInit.identity and attn.norm == ThetaNorm.batch
    begins = not folder.begun and config.resume in ("auto", "never") and config.model.weights is not None
    if not begins or not (automatic or identity):
        return None
    graft = together(world, lambda: _measure(config, world, needed=automatic))
    if automatic and graft is not None:
        # One rank decides: another device may round a similarity to the other side of the threshold.
        first = together(world, lambda: from_block(graft.similarity, config.collapse))
        _set(config, world.first(first))
        near = ", ".join(f"{value:.2f}" for value in graft.similarity.diagonal(-1).tolist())
        say(
            f"attn.from_block=auto: {config.attn.from_block}, from which on the maps of "
            f"{config.model.weights} are alike ({config.collapse.legend}); to the block before: {near}"
        )
    return graft if identity else None


def from_block(similarity: Tensor, config: CollapseConfig) -> int:
    """Return the like block with the fewest like ones before it and unlike ones after it, together.

    Of several such blocks the first is taken. A block is like those before it or not, as in an analysis.

    Args:
        similarity: (blocks, blocks), of which `similar_blocks` tells the like ones.

    Raises ConfigError if no block is like those before it.
    """
    similar = similar_blocks(similarity, config.threshold, config.k)
    like = similar.nonzero().flatten().tolist()
    if not like:
        near = similarity.diagonal(-1)
        block = int(near.argmax()) + 1
        raise ConfigError(
            "attn.from_block=auto: no block of model.weights has maps like those before it "
            f"({config.legend})\n"
            f"nearest: attn.from_block={block}, whose cosine to the block before is the highest "
            f"({near[block - 1]:.2f}), or a lower collapse.threshold"
        )
    return min(like, key=lambda first: int(similar[:first].sum() + (~similar[first:]).sum()))


def _set(config: TrainConfig, block: int) -> None:
    config.attn = replace(config.attn, from_block=block)


def _block_before(config: TrainConfig, folder: RunFolder) -> int | None:
    """Return the block that was found when the run began, or that of the run that it goes on from."""
    if folder.begun:
        return int(folder.stored_config()["attn"]["from_block"])
    if config.resume in ("auto", "never"):
        return None
    found = find(config.resume, prefer="last", key="resume")
    if (description := read_description(found.file)) is None:
        raise CheckpointError(f"resume={config.resume}: does not say attn.from_block; give it as a number")
    return description.architecture.attn.first


def _measure(config: TrainConfig, world: World, needed: bool) -> Graft | None:
    """Record the maps of the plain model of these weights. Returns None for others, unless that is needed."""
    assert config.model.weights is not None
    train = open_split(config.data, "train", is_for_training=True)
    model = DeepViT(Architecture(config.model, attention_preset("self")), len(train.classes))
    try:
        start_from(model, config.model.weights, download=config.download)
    except CheckpointError:
        if needed:
            raise
        return None  # it mixes heads itself, or can't be read: who loads it for the run says so
    alone, data = World(rank=0, size=1, device=world.device), replace(config.data, workers=0)
    count = config.collapse.images
    loaders = Loaders(config.model.preprocessing, data, alone)
    (batch,) = loaders.calibration(train, count, count, seed=0)
    model = model.to(world.device)
    sums = [torch.zeros(()), torch.zeros(()), torch.zeros(())]
    for images in batch.images.split(CHUNK):
        share = len(images) / len(batch.images)
        sums = [total + share * each for total, each in zip(sums, _look(model, images, config), strict=True)]
    similarity, means, squares = sums
    return Graft(similarity, means.float(), (squares - means.square()).float())


def _look(model: DeepViT, images: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return the similarity of blocks, and the means of maps and of their squares, for some images."""
    maps = [record.before.cpu() for record in record_maps(model, images)]
    means = [reduce(each.double(), "b h n m -> h", "mean") for each in maps]
    squares = [reduce(each.double().square(), "b h n m -> h", "mean") for each in maps]
    similarity = similarity_matrix(maps, config.collapse.axis, config.collapse.metric)
    return similarity, torch.stack(means), torch.stack(squares)
