"""Re-attention: the formula, the operator that keeps no map, and what the operator is made of."""

from deepvit_train.models.reattention.formula import (
    HeadMixer,
    mix_heads,
    plain_reattention,
    reattention,
    softmax_maps,
)

__all__ = ["HeadMixer", "mix_heads", "plain_reattention", "reattention", "softmax_maps"]
