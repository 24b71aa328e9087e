"""Re-attention: the formula, the operator that keeps no map, and what the operator is made of."""

from deepvit_train.models.reattention.centring import AttentionScale, Centring
from deepvit_train.models.reattention.formula import (
    HeadMixer,
    mix_heads,
    plain_reattention,
    reattention,
    softmax_maps,
)

__all__ = [
    "AttentionScale",
    "Centring",
    "HeadMixer",
    "mix_heads",
    "plain_reattention",
    "reattention",
    "softmax_maps",
]
