"""DeepViT, the plain ViT that it is compared with, and what loads and records them."""

from deepvit_train.models import registry
from deepvit_train.models.attention import Attention, ReAttention
from deepvit_train.models.attention_talking_heads import TalkingHeads
from deepvit_train.models.deepvit import DeepViT
from deepvit_train.models.importer import load_model
from deepvit_train.models.importer.start import start_from
from deepvit_train.models.record import BlockRecord, record_maps

__all__ = [
    "Attention",
    "BlockRecord",
    "DeepViT",
    "ReAttention",
    "TalkingHeads",
    "load_model",
    "record_maps",
    "registry",
    "start_from",
]
