"""Compute attention with talking heads, which mixes heads before the softmax as well as after it.

Shapes: B batch, N tokens, H heads, K head_dim.
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from deepvit_train.config.model import AttentionConfig, ThetaInit
from deepvit_train.models.attention import ReAttention, form
from deepvit_train.models.reattention import HeadMixer, mix_heads


@form("talking_heads")
class TalkingHeads(ReAttention):
    """CaiT's attention, which mixes heads before the softmax too.

    It does so by `logit_theta` (H, H) and `logit_bias` (H,). Dropout acts on the mixed maps.

    Source: arXiv 2003.02436 and 2103.17239; the code of the latter draws the matrices from
    trunc_normal(0.02).
    """

    logit_theta: Tensor
    logit_bias: Tensor

    def _build_theta(self, heads: int, attn: AttentionConfig) -> None:
        self.logit_theta = nn.Parameter(torch.eye(heads))
        self.logit_bias = nn.Parameter(torch.zeros(heads))
        self.theta = nn.Parameter(torch.eye(heads))
        self.theta_bias = nn.Parameter(torch.zeros(heads))
        if attn.theta_init == ThetaInit.random:
            trunc_normal_(self.logit_theta, std=0.02)
            trunc_normal_(self.theta, std=0.02)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            full = torch.promote_types(v.dtype, torch.float32)
            after = self.mixed(self.softmax_maps(q.to(full), k.to(full)))
            return (after @ v.to(full)).to(v.dtype)

    def softmax_maps(self, q: Tensor, k: Tensor) -> Tensor:
        logits = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        mixer = self.mixer
        assert isinstance(mixer, TalkingHeads)
        return mix_heads(logits, HeadMixer(mixer.logit_theta, mixer.logit_bias)).softmax(dim=-1)

    def mixed(self, maps: Tensor) -> Tensor:
        return self._drop(mix_heads(maps, self.head_mixer))
