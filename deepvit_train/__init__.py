"""Train, evaluate and explain DeepViT: deep vision transformers with re-attention (arXiv 2103.11886)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepvit_train.commands.train_call import train
    from deepvit_train.models import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "train"]

# Where a name of this package stands. It is imported when it is first asked for, because torch takes seconds.
_HOMES = {"load_model": "deepvit_train.models", "train": "deepvit_train.commands.train_call"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(_HOMES[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
