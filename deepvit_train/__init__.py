"""Train, evaluate and explain DeepViT: deep vision transformers with re-attention (arXiv 2103.11886)."""

__version__ = "0.1.0"
