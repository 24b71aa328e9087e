"""Make a model of torch's own operations alone, which gives the same logits in evaluation.

Shapes: B batch, N tokens, D dim, H heads, K head_dim.
"""

from __future__ import annotations

import copy

import torch
from einops import rearrange
from torch import Tensor, nn

from deepvit_train.models import DeepViT
from deepvit_train.models.attention import ReAttention
from deepvit_train.models.attention_talking_heads import TalkingHeads
from deepvit_train.models.reattention import Centring


class MixedAttention(nn.Module):
    """Attention whose heads are mixed, as matrix products. (B, N, D) -> (B, N, D).

    In evaluation BatchNorm is an affine map of each head with known numbers, so it becomes a part of Theta
    and its bias: gamma (Theta^T A + b - mean) / sqrt(var + eps) + beta. What LayerNorm needs is known only
    with the maps, so it stays. The factor on the maps, if there is one, goes into the last of the two.

    Args:
        attention: the trained module. Its projections are used as they are, its Theta is copied.
    """

    def __init__(self, attention: ReAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = attention.heads, attention.head_dim
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        mixer = attention.mixer
        talks = isinstance(mixer, TalkingHeads)
        self.before = _Mixing(mixer.logit_theta, mixer.logit_bias) if talks else None
        self.after = _folded(attention)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.heads).unbind(0)
        logits = self.q_norm(q) @ self.k_norm(k).transpose(-2, -1) * self.head_dim**-0.5
        if self.before is not None:
            logits = self.before(logits)
        out = self.after(logits.softmax(dim=-1)) @ v
        return self.proj(rearrange(out, "b h n k -> b n (h k)"))


class _Mixing(nn.Module):
    """Theta^T A + bias for the maps A of all heads, (B, H, N, N) -> (B, H, N, N)."""

    theta: Tensor
    bias: Tensor

    def __init__(self, theta: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("theta", theta.detach().float().T.contiguous())
        self.register_buffer("bias", bias.detach().float()[:, None].contiguous())

    def forward(self, maps: Tensor) -> Tensor:
        return (self.theta @ maps.flatten(2) + self.bias).unflatten(2, maps.shape[2:])


class _NormalisedMixing(_Mixing):
    """The same with a LayerNorm across heads after it, at each (query, key)."""

    def __init__(self, theta: Tensor, bias: Tensor, norm: nn.LayerNorm, scale: float) -> None:
        super().__init__(theta, bias)
        self.norm = copy.deepcopy(norm)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.mul_(scale)

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(super().forward(maps).movedim(1, -1)).movedim(-1, 1)


class _CentredMixing(_Mixing):
    """The same with the rows centred after it, and a factor."""

    def __init__(self, theta: Tensor, bias: Tensor, norm: Centring, scale: float) -> None:
        super().__init__(theta, bias)
        self.norm, self.scale = copy.deepcopy(norm).float(), scale

    def forward(self, maps: Tensor) -> Tensor:
        return self.norm(super().forward(maps)) * self.scale


def _folded(attention: ReAttention) -> _Mixing:
    """Return the mixing of softmax maps, with its norm and factor. It is computed in float64."""
    theta, bias, norm, scale = attention.head_mixer
    theta = theta.detach().double()
    bias = torch.zeros(len(theta), dtype=torch.float64) if bias is None else bias.detach().double()
    if isinstance(norm, nn.LayerNorm):
        return _NormalisedMixing(theta, bias, norm, scale)
    if isinstance(norm, Centring):
        return _CentredMixing(theta, bias, norm, scale)
    if isinstance(norm, nn.BatchNorm2d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight.detach().double() * (norm.running_var.double() + norm.eps).rsqrt()
        theta = theta * factor
        bias = factor * (bias - norm.running_mean.double()) + norm.bias.detach().double()
    return _Mixing(theta * scale, bias * scale)


def plain_model(model: DeepViT) -> DeepViT:
    """Return a copy of a model in evaluation mode on the CPU, without any operator of this project.

    Its BatchNorms over maps use the running statistics, so write the calibrated ones there first.
    """
    plain = copy.deepcopy(model).cpu().eval()
    for block in plain.blocks:
        if isinstance(block.attn, ReAttention):
            block.attn = MixedAttention(block.attn)
    return plain.requires_grad_(False)


def largest_input(model: DeepViT, batch: int) -> Tensor:
    """Return noise of the model's input, (batch, C, S, S)."""
    channels, height, width = model.pretrained_cfg["input_size"]
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def traced(model: DeepViT) -> torch.export.ExportedProgram:
    """Return the graph of a plain model, for any batch size. It names no file of this machine."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(model, (largest_input(model, 2),), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
