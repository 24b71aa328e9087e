"""Offer what training scripts and feature extractors ask of a vision transformer, under timm's names.

Shapes: B batch, C colour channels, N tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.layers import resample_abs_pos_embed
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deepvit_train.config.model import ModelConfig, Pool, Stem
from deepvit_train.config.preprocessing import Preprocessing
from deepvit_train.error import ConfigError, nearest
from deepvit_train.models.attention import ReAttention

# timm's names for what the head reads. '' stands for all tokens, without pooling.
POOLS = {"token": Pool.cls, "avg": Pool.mean, "": None}


def pool_named(name: str | Pool | None) -> Pool | None:
    """Return the pooling that this project or timm calls so. Raises ConfigError for an unknown name."""
    if name is None or isinstance(name, Pool):
        return name
    known = {**POOLS, **{pool.value: pool for pool in Pool}}
    if name not in known:
        raise ConfigError(
            f"pool={name}: unknown{nearest(name, list(known))} (choices: cls|token, mean|avg, "
            "mean_patches, mean_normed_patches, '')"
        )
    return known[name]


def pretrained_cfg_of(model: ModelConfig, num_classes: int, channels: int = 3) -> dict[str, Any]:
    """Return what timm's data pipeline reads of a model: its input and its preprocessing."""
    return {
        "url": "",
        "num_classes": num_classes,
        "input_size": (channels, model.image_size, model.image_size),
        "pool_size": None,
        "crop_pct": model.crop_pct,
        "interpolation": model.interpolation.value,
        "fixed_input_size": True,
        "mean": tuple(model.mean),
        "std": tuple(model.std),
        "first_conv": "patch_embed.conv1" if model.stem == Stem.cnn else "patch_embed.proj",
        "classifier": "head",
    }


class TimmInterface(nn.Module):
    """The methods of timm's VisionTransformer for a model that has its attributes."""

    blocks: nn.Sequential
    norm: nn.Module
    head: nn.Module
    patch_embed: nn.Module
    norm_pre: nn.Module
    cls_token: nn.Parameter | None
    reg_token: nn.Parameter | None
    pos_embed: nn.Parameter
    pos_drop: nn.Module
    pool: Pool | None
    num_classes: int
    num_features: int
    num_prefix_tokens: int
    grad_checkpointing: bool = False
    frozen: tuple[nn.Module, ...] = ()
    pretrained_cfg: dict[str, Any]  # timm's data pipeline reads it, in models that timm did not build too
    default_cfg: dict[str, Any]
    preprocessing: Preprocessing
    class_names: list[str] | None = None

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens before the first block. (B, C, height, width) -> (B, N, D)."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, or by none if `num_classes` is 0.

        `global_pool` is 'token', 'avg' or '' (all tokens); None leaves the pooling as it is.
        """
        if global_pool is not None:
            self.set_pool(global_pool)
        self.num_classes, self.class_names = num_classes, None
        like = next(self.blocks.parameters())
        fresh = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = fresh.to(like.device, like.dtype).train(self.training)

    def set_pool(self, name: str | Pool | None) -> None:
        """Let the head read something else. Raises ConfigError for what is unknown or not there."""
        pool = pool_named(name)
        if pool == Pool.cls and self.cls_token is None:
            raise ConfigError(f"pool={name}: the model has no class token; nearest: avg")
        self.pool = pool

    @property
    def num_class_tokens(self) -> int:
        """Return 1, or 0 for a model without a class token."""
        return 0 if self.cls_token is None else 1

    def set_input_size(self, img_size: int) -> None:
        """Make the model take square images of `img_size` pixels a side.

        Position embeddings are resampled, except the class token's. The running statistics of a BatchNorm
        over maps still belong to the former number of tokens, so calibrate them afterwards.

        Raises:
            ConfigError: the patch size does not divide the size.
        """
        patch = self.feature_info[0]["reduction"]
        if img_size % patch:
            near = max(1, round(img_size / patch)) * patch
            raise ConfigError(
                f"image_size={img_size} is not divisible by the model's patch size, {patch}; nearest: {near}"
            )
        side = img_size // patch
        positions = resample_abs_pos_embed(
            self.pos_embed.detach(), [side, side], num_prefix_tokens=self.num_class_tokens
        )
        self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        for known in (self.pretrained_cfg, self.default_cfg):
            known["input_size"] = (known["input_size"][0], img_size, img_size)
        self.preprocessing = replace(self.preprocessing, image_size=img_size)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of two or more dimensions that weight decay leaves out."""
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the layers of layer-wise learning rate decay, as patterns of parameter names."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def set_sync_norm(self, enable: bool = True) -> None:
        """Train re-attention's BatchNorm with the statistics of all ranks' batches, not each rank's own."""
        for module in self.blocks.modules():
            if isinstance(module, ReAttention):
                module.sync_norm = enable

    def freeze(self, blocks: int = 0, head_only: bool = False) -> None:
        """Freeze the stem, the learned tokens and the first `blocks` blocks, or all but the head.

        A frozen part gets no gradients and stays in evaluation mode, so that its running statistics stay the
        same and nothing is dropped. Nothing is frozen if `blocks` is 0 and `head_only` is false.
        """
        tail = [self.norm] if head_only else []
        count = len(self.blocks) if head_only else blocks
        if not (count or head_only):
            return
        self.frozen = (self.patch_embed, self.pos_drop, self.norm_pre, *self.blocks[:count], *tail)
        tokens = [each for each in (self.cls_token, self.reg_token, self.pos_embed) if each is not None]
        for parameter in [*tokens, *(each for part in self.frozen for each in part.parameters())]:
            parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmInterface:
        """Set the mode as nn.Module.train does, and leave what is frozen in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def run_block(self, block: Any, x: Tensor, maps: bool = False) -> Any:
        """Run a block, with gradient checkpointing if that is on.

        Returns what block.forward returns, or with `maps` what block.forward_with_maps returns.
        """
        call = block.forward_with_maps if maps else block
        if not (self.grad_checkpointing and self.training):
            return call(x)
        if torch.compiler.is_compiling():  # a compiled graph updates buffers only once by itself
            return checkpoint(call, x, use_reentrant=False)
        return checkpoint(call, x, use_reentrant=False, context_fn=partial(_passes, block))

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Return the name of each block's features, their channels, and the pixels that a token spans."""
        size = self.patch_embed.patch_size
        return [
            {"module": f"blocks.{index}", "num_chs": self.num_features, "reduction": size}
            for index in range(len(self.blocks))
        ]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the features of chosen blocks, and the tokens after the last block.

        Args:
            x: images (B, C, height, width).
            indices: numbers of the blocks; a single number n stands for the last n blocks, None for all.
            return_prefix_tokens: whether to return pairs of features and prefix tokens (B, prefix, D), which
                are class token and registers.
            norm: whether features pass through the final norm.
            stop_early: whether to leave out the blocks after the last chosen one.
            output_fmt: 'NCHW' for (B, D, rows, columns of patches), or 'NLC' for (B, patches, D).
            intermediates_only: whether to return the list of features alone.

        Returns:
            The normalised tokens (B, N, D) and the list of features, or the list alone.

        Raises:
            ConfigError: output_fmt is neither of the two.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt={output_fmt}: must be NCHW or NLC")
        wanted, last = feature_take_indices(len(self.blocks), indices)  # pyright: ignore[reportArgumentType]
        rows = x.shape[-2] // self.feature_info[0]["reduction"]
        found: list[Any] = []
        x = self.embed(x)
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self.run_block(block, x)
            if index in wanted:
                prefix, patches = (self.norm(x) if norm else x).tensor_split([self.num_prefix_tokens], dim=1)
                if output_fmt == "NCHW":
                    patches = rearrange(patches, "b (h w) d -> b d h w", h=rows).contiguous()
                found.append((patches, prefix) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what `forward_intermediates` doesn't need for these blocks. Returns their numbers."""
        wanted, last = feature_take_indices(len(self.blocks), indices)  # pyright: ignore[reportArgumentType]
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted


def _passes(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts for a checkpointed block's two passes. Only the first may change running statistics."""
    return nullcontext(), _buffers_kept(block)


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:  # torch ends the second pass by an exception, once it has what the backward pass needs
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
