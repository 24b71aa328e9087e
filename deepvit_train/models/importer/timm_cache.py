"""Find the weights of timm's models by name, in the caches where timm keeps them."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import PretrainedCfg

from deepvit_train.error import CheckpointError, nearest

PREFIX = "timm:"
# What the hub calls a model's weights; the first that is there is taken.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def weights_file(name: str, download: bool) -> Path:
    """Return the weights file of a timm model: 'vit_small_patch16_224', with or without '.TAG'.

    Args:
        download: whether to fetch a file that is not in the cache.

    Raises CheckpointError for a name that timm does not know, or has no weights of, and for a file that is
    not in the cache or can't be fetched.
    """
    described = known(name)
    if described is None or not (described.hf_hub_id or described.url):
        guess = (
            nearest(name, [*timm.list_models(), *timm.list_models(pretrained=True)])
            if described is None
            else ""
        )
        raise CheckpointError(f"timm has no weights of {name}{guess}")
    found = _in_hub(described) or _in_torch(described)
    if found is not None:
        return found
    if not download:
        raise CheckpointError(
            f"is not in timm's cache (asked for {described.hf_hub_id or described.url}); "
            "nearest: download=true fetches it"
        )
    return _fetched(described)


def known(name: str) -> PretrainedCfg | None:
    """Return what timm knows of the weights of a model, or None."""
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        return None


def heads_of(name: str) -> int | None:
    """Return the number of attention heads of timm's model of this name, or None if it is no plain ViT."""
    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        blocks = getattr(timm.create_model(name), "blocks", None)
    try:
        return int(blocks[0].attn.num_heads)  # pyright: ignore
    except (TypeError, AttributeError, IndexError):
        return None


def _in_hub(described: PretrainedCfg) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if not described.hf_hub_id:
        return None
    repository, _, revision = described.hf_hub_id.partition("@")
    for file in filter(None, (described.hf_hub_filename, *HUB_FILES)):
        found = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _in_torch(described: PretrainedCfg) -> Path | None:
    if not isinstance(described.url, str) or not described.url:
        return None
    file = Path(torch.hub.get_dir()) / "checkpoints" / described.url.rsplit("/", 1)[-1]
    return file if file.is_file() else None


def _fetched(described: PretrainedCfg) -> Path:
    from huggingface_hub import hf_hub_download
    from timm.models import _hub

    failures = []
    repository, _, revision = (described.hf_hub_id or "").partition("@")
    for file in filter(None, (described.hf_hub_filename, *HUB_FILES)) if repository else ():
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except Exception as error:  # the hub's client raises anything where there is no network
            failures.append(error)
    if described.url:
        try:
            return Path(_hub.download_cached_file(described.url, check_hash=True))
        except Exception as error:
            failures.append(error)
    reason = str(failures[0]).strip().splitlines() if failures else []
    raise CheckpointError(f"can't be fetched ({reason[0] if reason else 'no reason given'})")
