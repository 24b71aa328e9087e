"""DeepViT and the plain ViT it is compared with."""

from deepvit_train.models.attention import Attention, ReAttention
from deepvit_train.models.deepvit import DeepViT, build_model

__all__ = ["Attention", "DeepViT", "ReAttention", "build_model"]
