"""Declare the keys of `model` and `attn`: the model's shape, its preprocessing, and its attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deepvit_train.config.option import Choice, Section, option
from deepvit_train.config.preprocessing import Interpolation, Preprocessing
from deepvit_train.config.shipped import attention_kinds
from deepvit_train.error import CheckpointError, ConfigError


class AttentionKind(Choice):
    """A form of attention: each that a file of configs/attn/ names. models/attention.py has their classes."""

    vars().update({kind: kind for kind in attention_kinds()})


class ThetaNorm(Choice):
    batch = "batch"  # BatchNorm over images, queries and keys, with one mean and variance per head
    layer = "layer"  # LayerNorm across heads at each (query, key)
    centred = "centred"  # the mean of each row is taken out, and the rest gets a learned gain per head
    attn_scale = "attn_scale"  # the mean of each row stays, and the rest gets a learned gain (AttnScale)
    none = "none"


class ThetaInit(Choice):
    random = "random"
    identity = "identity"


class Stem(Choice):
    conv = "conv"  # one strided convolution
    cnn = "cnn"  # conv7x7/2-BN-ReLU, conv3x3-BN-ReLU, strided convolution (DeepViT-S and -L)
    rearrange = "rearrange"  # flattened patches, LayerNorm, Linear, LayerNorm (vit-pytorch)


class Pool(Choice):
    cls = "cls"  # the class token
    mean = "mean"  # the mean of class token and patches, normalised after it (vit-pytorch)
    mean_patches = "mean_patches"  # the mean of the patches, normalised after it (timm's avg with fc_norm)
    mean_normed_patches = "mean_normed_patches"  # the mean of the normalised patches (timm's without)


class Act(Choice):
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"  # its approximation by tanh (SigLIP 2)
    quick_gelu = "quick_gelu"  # x sigmoid(1.702 x) (OpenAI's CLIP)


class Init(Choice):
    vit = "vit"  # trunc_normal(0.02) weights and tokens, zero biases
    vit_pytorch = "vit_pytorch"  # torch's defaults, N(0, 1) position and class token


@dataclass(kw_only=True, slots=True)
class ModelConfig(Section):
    image_size: int = option("height and width of the input, pixels", low=1, high=8192)
    patch_size: int = option("height and width of a patch, pixels; it divides image_size", low=1, high=8192)
    stem: Stem = option("how an image becomes tokens")
    dim: int = option("width of the residual stream", low=1, high=65536)
    depth: int = option("number of blocks", low=1, high=4096)
    heads: int = option("attention heads", low=1, high=4096)
    head_dim: int | None = option("width of a head; null: dim / heads", low=1, high=65536)
    mlp_ratio: float = option("hidden width of the MLP, in units of dim", above=0, high=64)
    act: Act = option("activation inside the MLP")
    qkv_bias: bool = option("whether the query-key-value projection has a bias")
    qk_norm: bool = option("whether queries and keys pass a LayerNorm over the width of a head")
    class_token: bool = option("whether a learned class token comes before the patches")
    pre_norm: bool = option("whether a LayerNorm comes before the first block (CLIP)")
    final_norm: bool = option("whether a LayerNorm comes after the last block")
    pool: Pool = option(
        "what the head reads: the class token; the mean of it and the patches; or the mean of the patches "
        "alone, normalised after or before it"
    )
    dropout: float = option("dropout after projections and inside the MLP", low=0, below=1)
    emb_dropout: float = option("dropout on the embedded tokens", low=0, below=1)
    drop_path: float = option("stochastic depth of the last block, rising linearly from 0", low=0, below=1)
    layer_scale: float | None = option(
        "initial value of the learned factors on the channels of a branch (LayerScale); null: no factors",
        above=0,
        high=10,
    )
    registers: int = option(
        "learned tokens beside the class token, which the classifier does not read", low=0, high=4096
    )
    residual_scale: float = option(
        "s in x + branch(norm(s x)) / s; 0.5 in DeepViT-S and -L", above=0, high=100
    )
    norm_eps: float = option("epsilon of every LayerNorm", above=0, high=1)
    init: Init = option("how weights start")
    mean: list[float] = option("mean of each colour channel, for values in 0..1", low=0, high=1)
    std: list[float] = option(
        "standard deviation of each colour channel, for values in 0..1", above=0, high=1
    )
    crop_pct: float = option("share of the resized image that the evaluation crop keeps", above=0, high=1)
    interpolation: Interpolation = option("how images are resized")
    weights: str | None = option(
        "weights file or checkpoint to start from, of any layout; timm:NAME or hf:ORG/NAME[@REVISION], for "
        "those in the cache of timm or of the Hugging Face hub; null: fresh weights",
        path=CheckpointError,
    )

    @classmethod
    def prefix(cls) -> str:
        return "model."

    def check(self) -> None:
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"model.image_size={self.image_size} is not divisible by model.patch_size={self.patch_size}; "
                f"nearest: model.image_size={_nearest_multiple(self.image_size, self.patch_size)}"
            )
        if self.stem == Stem.cnn and self.patch_size % 2:
            raise ConfigError(
                f"model.patch_size={self.patch_size}: model.stem=cnn halves the image first, so the patch "
                f"must be even; nearest: model.patch_size={self.patch_size + 1}"
            )
        if self.head_dim is None and self.dim % self.heads:
            raise ConfigError(
                f"model.dim={self.dim} is not divisible by model.heads={self.heads}; "
                f"nearest: model.dim={_nearest_multiple(self.dim, self.heads)}, or give model.head_dim"
            )
        if self.weights == "":
            raise ConfigError(
                "model.weights is not given, but this run starts from weights; add model.weights=FILE"
            )
        if self.pool == Pool.cls and not self.class_token:
            raise ConfigError(
                "model.pool=cls: with model.class_token=false there is no class token to read; nearest: "
                "model.pool=mean_patches"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)}: needs three numbers, one for each colour channel"
                )

    @property
    def width_of_head(self) -> int:
        """Return the width of a head: head_dim, or dim / heads if that is not given."""
        return self.head_dim or self.dim // self.heads

    @property
    def mlp_dim(self) -> int:
        """Return the hidden width of the MLP."""
        return int(self.dim * self.mlp_ratio)

    @property
    def preprocessing(self) -> Preprocessing:
        """Return what the model expects of its images."""
        return Preprocessing(
            self.image_size, tuple(self.mean), tuple(self.std), self.crop_pct, self.interpolation
        )


@dataclass(kw_only=True, slots=True)
class AttentionConfig(Section):
    kind: AttentionKind = option("form of attention: self is plain, the others mix heads")
    from_block: int | None = option(
        "first block that mixes its heads; blocks before it use plain attention; auto: the one from which on "
        "the maps of model.weights are alike, which config.yaml then names",
        low=0,
    )
    norm: ThetaNorm = option("normalisation of the mixed maps")
    theta_init: ThetaInit = option("how the H x H mixing matrix starts")
    theta_frozen: bool = option(
        "whether the mixing matrix stays as it starts; with theta_init=identity no heads are mixed, and the "
        "norm acts alone"
    )
    theta_shared: bool = option("whether all blocks that mix share one mixing matrix")
    transform_scale: bool = option("whether to multiply the normalised maps by head_dim^-0.5 (DeepViT-S)")
    dropout: float | None = option("dropout on the softmax maps; null: as model.dropout", low=0, below=1)
    qk_gain: float = option(
        "factor on the fresh weights of queries and keys in every block; above 1 maps start less uniform",
        above=0,
        high=100,
    )

    @classmethod
    def prefix(cls) -> str:
        return "attn."

    @property
    def first(self) -> int:
        """Return the first block that mixes its heads. Raises ConfigError while nobody has found it."""
        if self.from_block is None:
            raise ConfigError(
                "attn.from_block=auto: only deepvit-train finds the block, from model.weights=FILE; nearest: "
                "attn.from_block=0"
            )
        return self.from_block

    def mixes(self, block: int) -> bool:
        """Return whether this block mixes its heads. Blocks count from 0."""
        return self.kind != "self" and block >= self.first

    def borrows(self, block: int) -> bool:
        """Return whether this block mixes its heads by the Theta of another block."""
        return self.theta_shared and self.mixes(block) and block > self.first


def check_architecture(model: ModelConfig, attn: AttentionConfig) -> None:
    """Raise ConfigError if model and attention do not fit each other."""
    if attn.kind == "self":
        return
    if attn.from_block is None:
        if model.weights is None:
            raise ConfigError(
                "attn.from_block=auto: the block is found from model.weights=FILE, which is not given; "
                "nearest: attn.from_block=0"
            )
    elif attn.from_block >= model.depth:
        raise ConfigError(
            f"attn.from_block={attn.from_block} is beyond model.depth={model.depth}: no block would mix "
            f"its heads; nearest: attn.from_block={model.depth - 1}, or attn=self"
        )


def mlp_ratio_of(hidden: int, dim: int) -> float:
    """Return the mlp_ratio that gives an MLP of this hidden width, in spite of rounding."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, round(value / unit)) * unit
