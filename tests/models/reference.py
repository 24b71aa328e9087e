"""Compute DeepViT by its formulas, from a state dict in the authors' names. No code is shared.

Shapes: B batch, C colour channels, N tokens, D dim, H heads, K head_dim, P patch size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

State = dict[str, Tensor]


def authors_state(
    *,
    dim: int = 24,
    depth: int = 3,
    heads: int = 3,
    hidden: int = 72,
    image_size: int = 16,
    patch_size: int = 4,
    classes: int = 5,
    cnn: bool = False,
    from_block: int = 0,
    seed: int = 0,
) -> State:
    """A state dict with random values, in the authors' layout."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, around: float = 0.0, spread: float = 0.3) -> Tensor:
        return around + spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    state = {
        "cls_token": random(1, 1, dim),
        "pos_embed": random(1, (image_size // patch_size) ** 2 + 1, dim),
        **_affine("norm", dim, random),
        **_linear("head", classes, dim, random),
    }
    if cnn:
        state["patch_embed.conv1.weight"] = random(64, 3, 7, 7, spread=0.1)
        state["patch_embed.conv2.weight"] = random(64, 64, 3, 3, spread=0.05)
        state |= _batch_norm("patch_embed.bn1", 64, random) | _batch_norm("patch_embed.bn2", 64, random)
        state["patch_embed.proj.weight"] = random(dim, 64, patch_size // 2, patch_size // 2, spread=0.1)
    else:
        state["patch_embed.proj.weight"] = random(dim, 3, patch_size, patch_size)
    state["patch_embed.proj.bias"] = random(dim)
    for index in range(depth):
        block = f"blocks.{index}"
        state |= _affine(f"{block}.norm1", dim, random) | _affine(f"{block}.norm2", dim, random)
        state |= _linear(f"{block}.attn.qkv", 3 * dim, dim, random)
        state |= _linear(f"{block}.attn.proj", dim, dim, random)
        state |= _linear(f"{block}.mlp.fc1", hidden, dim, random)
        state |= _linear(f"{block}.mlp.fc2", dim, hidden, random)
        if index >= from_block:
            state[f"{block}.attn.reatten_matrix.weight"] = random(heads, heads, 1, 1)
            state[f"{block}.attn.reatten_matrix.bias"] = random(heads)
            state |= _batch_norm(f"{block}.attn.var_norm", heads, random)
    return state


def authors_logits(
    state: State,
    images: Tensor,
    *,
    heads: int,
    residual_scale: float = 1.0,
    transform_scale: bool = False,
    batch_statistics: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Logits (B, classes) of images (B, C, height, width).

    With a dict in `batch_statistics` each re-attention normalises by its batch's own mean and variance, as in
    training, and notes them there: {'blocks.0': (mean (H,), variance (H,))}.
    """
    x = _stem(state, images)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(depth):
        block = f"blocks.{index}"
        normed = _layer_norm(state, f"{block}.norm1", x * residual_scale)
        x = x + _attention(state, block, normed, heads, transform_scale, batch_statistics) / residual_scale
        normed = _layer_norm(state, f"{block}.norm2", x * residual_scale)
        hidden = normed @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = (
            x
            + (hidden @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]) / residual_scale
        )
    return _layer_norm(state, "norm", x)[:, 0] @ state["head.weight"].T + state["head.bias"]


def _attention(
    state: State,
    block: str,
    x: Tensor,
    heads: int,
    transform_scale: bool,
    batch_statistics: dict[str, tuple[Tensor, Tensor]] | None,
) -> Tensor:
    batch, tokens, dim = x.shape
    width = dim // heads
    qkv = x @ state[f"{block}.attn.qkv.weight"].T + state[f"{block}.attn.qkv.bias"]
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width).permute(2, 0, 3, 1, 4)
    scores = torch.stack([q[:, head] @ k[:, head].mT / math.sqrt(width) for head in range(heads)], 1)
    maps = scores.exp() / scores.exp().sum(-1, keepdim=True)
    if f"{block}.attn.reatten_matrix.weight" in state:
        theta = state[f"{block}.attn.reatten_matrix.weight"][:, :, 0, 0]
        mixed = [
            sum(theta[new, old] * maps[:, old] for old in range(heads))
            + state[f"{block}.attn.reatten_matrix.bias"][new]
            for new in range(heads)
        ]
        if batch_statistics is not None:
            mean = torch.stack([each.mean() for each in mixed])
            variance = torch.stack([each.var(unbiased=False) for each in mixed])
            batch_statistics[block] = mean, variance
        else:
            mean, variance = (state[f"{block}.attn.var_norm.running_{what}"] for what in ("mean", "var"))
        weight, bias = (state[f"{block}.attn.var_norm.{what}"] for what in ("weight", "bias"))
        maps = torch.stack(
            [
                (mixed[head] - mean[head]) / (variance[head] + 1e-5).sqrt() * weight[head] + bias[head]
                for head in range(heads)
            ],
            1,
        )
        if transform_scale:
            maps = maps / math.sqrt(width)
    out = torch.cat([maps[:, head] @ v[:, head] for head in range(heads)], -1)
    return out @ state[f"{block}.attn.proj.weight"].T + state[f"{block}.attn.proj.bias"]


def _stem(state: State, images: Tensor) -> Tensor:
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    if "patch_embed.conv1.weight" in state:
        images = _convolve(images, state["patch_embed.conv1.weight"], stride=2, padding=3)
        images = _normed_relu(state, "patch_embed.bn1", images)
        images = _convolve(images, state["patch_embed.conv2.weight"], stride=1, padding=1)
        images = _normed_relu(state, "patch_embed.bn2", images)
    patches = _convolve(images, kernel, stride=kernel.shape[-1], padding=0) + bias.view(1, -1, 1, 1)
    return patches.flatten(2).mT


def _convolve(images: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    size = kernel.shape[-1]
    columns = torch.nn.functional.unfold(images, size, stride=stride, padding=padding)
    side = (images.shape[-1] + 2 * padding - size) // stride + 1
    return (kernel.flatten(1) @ columns).unflatten(-1, (side, side))


def _normed_relu(state: State, name: str, x: Tensor) -> Tensor:
    mean, variance, weight, bias = (
        state[f"{name}.{what}"].view(1, -1, 1, 1)
        for what in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)


def _layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _affine(name: str, width: int, random) -> State:
    return {f"{name}.weight": random(width, around=1.0), f"{name}.bias": random(width)}


def _linear(name: str, rows: int, columns: int, random) -> State:
    return {f"{name}.weight": random(rows, columns), f"{name}.bias": random(rows)}


def _batch_norm(name: str, width: int, random) -> State:
    return {
        **_affine(name, width, random),
        f"{name}.running_mean": random(width, spread=0.1),
        f"{name}.running_var": random(width).abs() + 0.05,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }
