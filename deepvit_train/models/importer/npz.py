"""Read Google's .npz files of vision transformers, and give their arrays timm's names and shapes.

The names are embedding/{kernel, bias}, cls, Transformer/posembed_input/pos_embedding or pos_embedding,
Transformer/encoderblock_i/{LayerNorm_0, LayerNorm_2 or _1, MultiHeadDotProductAttention_1 or _0,
MlpBlock_3 or _0}/*, Transformer/encoder_norm/*, head/*, after an optional opt/target/ or params/. They are
those of google-research/vision_transformer, and of big_vision, whose numbers count from 0.

Shapes: D dim, H heads, K head_dim.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from deepvit_train.classes import TIMM
from deepvit_train.error import CheckpointError
from deepvit_train.models.importer import timm_vit
from deepvit_train.models.importer.layout import Layout, Prepared, Tensors
from deepvit_train.run.tensor import listed

KERNEL = "embedding/kernel"
PLACES = re.compile(r"(?:opt/target/|params/)")
PARTS = {"query": 0, "key": 1, "value": 2}
BLOCK = r"Transformer/encoderblock_(\d+)/"
ATTENTION = rf"{BLOCK}MultiHeadDotProductAttention_[01]/"
RULES = (
    (r"cls", "cls_token"),
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"(?:Transformer/posembed_input/)?pos_embedding", "pos_embed"),
    (rf"{BLOCK}LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (rf"{BLOCK}LayerNorm_[12]/(scale|bias)", r"blocks.\1.norm2.\2"),
    (rf"{ATTENTION}out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
    (rf"{BLOCK}MlpBlock_[03]/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{BLOCK}MlpBlock_[03]/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (r"head/(kernel|bias)", r"head.\1"),
)
UNUSED = r"pre_logits/(kernel|bias)"


def is_vision(names: list[str]) -> bool:
    """Return whether the records of an archive are those of Google's vision transformers."""
    return any(name.endswith(f"{KERNEL}.npy") for name in names)


def read_arrays(file: Path) -> dict[str, Tensor]:
    """Read the arrays of an .npz file. Nothing in it is executed, and no size is believed.

    Raises CheckpointError, and ValueError, OSError or zipfile.BadZipFile for a damaged file.
    """
    tensors: dict[str, Tensor] = {}
    with zipfile.ZipFile(file) as archive:
        claimed = sum(entry.file_size for entry in archive.infolist())
        if claimed > 2 * file.stat().st_size:  # numbers of a trained model can't be compressed that much
            raise CheckpointError(f"claims {claimed:,} bytes of content, but has {file.stat().st_size:,}")
        for entry in archive.infolist():
            with archive.open(entry) as opened:
                array = _read(opened, entry.file_size)
            tensors[entry.filename.removesuffix(".npy")] = torch.from_numpy(array)
    return tensors


def _read(opened: IO[bytes], size: int) -> np.ndarray[Any, Any]:
    """Read an array of a record with so many bytes. Raises ValueError for a header that claims more."""
    version = np.lib.format.read_magic(opened)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, turned, kind = readers[version](opened)
    if kind.kind not in "fiu":
        raise ValueError(f"an array holds {kind}, not numbers")
    count = int(np.prod(shape, dtype=object))
    if count * kind.itemsize > size:
        raise ValueError(f"an array claims {count:,} numbers, its record has {size:,} bytes")
    array = np.frombuffer(opened.read(count * kind.itemsize), dtype=kind, count=count)
    array = array.reshape(shape, order="F" if turned else "C")
    return np.array(array, dtype=kind.newbyteorder("="), order="C")


def _prepared(tensors: Tensors) -> Prepared:
    tensors = _split(tensors)
    found: Tensors = {}
    unread: Tensors = {}
    left_out: list[str] = []
    queries: dict[tuple[str, str], list[Tensor | None]] = {}
    for full, value in tensors.items():
        name = PLACES.sub("", full, count=1)
        if re.fullmatch(UNUSED, name):
            left_out.append(full)
        elif match := re.fullmatch(rf"{ATTENTION}(query|key|value)/(kernel|bias)", name):
            block, part, what = match.groups()
            queries.setdefault((block, what), [None] * 3)[PARTS[part]] = value
        else:
            own = next((m.expand(new) for old, new in RULES if (m := re.fullmatch(old, name))), None)
            if own is None or own in found:
                unread[full] = value
            else:
                found[own.replace("scale", "weight")] = value
    given = {re.sub("kernel$", "weight", name): _turned(name, value) for name, value in found.items()}
    for (block, what), parts in queries.items():
        name = f"blocks.{block}.attn.qkv.{'weight' if what == 'kernel' else 'bias'}"
        given[name] = _joined(name, [part for part in parts if part is not None])
    if both := sorted(given.keys() & unread.keys()):
        raise CheckpointError(listed("holds under two names", both))
    return Prepared(given | unread, left_out, _heads(queries))


def _split(tensors: Tensors) -> Tensors:
    """Return the arrays of single blocks, where big_vision stacked those of all blocks."""
    stacked = {name: value for name, value in tensors.items() if "/encoderblock/" in name and value.ndim}
    single = {
        name.replace("/encoderblock/", f"/encoderblock_{index}/"): part
        for name, value in stacked.items()
        for index, part in enumerate(value)
    }
    return {name: value for name, value in tensors.items() if name not in stacked} | single


def _turned(name: str, value: Tensor) -> Tensor:
    """Return an array in torch's order of dimensions: JAX has a kernel's outputs last."""
    if not name.endswith("kernel"):
        return value
    if ".attn.proj." in name and value.ndim == 3:  # (H, K, D)
        return value.flatten(0, 1).T
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)
    return value.T if value.ndim == 2 else value


def _joined(name: str, parts: list[Tensor]) -> Tensor:
    """Return the three projections of (D, H, K) or biases (H, K) as one, (3 x H x K, D) or (3 x H x K)."""
    kinds = {(part.shape, part.dtype) for part in parts}
    if len(parts) != 3 or len(kinds) > 1 or parts[0].ndim not in (2, 3):
        raise CheckpointError(f"{name}: query, key and value are not three of one shape and type")
    flat = [part.flatten(1).T if part.ndim == 3 else part.flatten() for part in parts]
    return torch.cat(flat)


def _heads(queries: dict[tuple[str, str], list[Tensor | None]]) -> dict[str, Any]:
    kernel = queries.get(("0", "kernel"), [None])[0]
    return {} if kernel is None or kernel.ndim != 3 else {"heads": kernel.shape[1]}


LAYOUT = Layout(
    "Google's",
    r"(^|/)embedding/kernel$",
    timm_vit.RULES,
    1e-6,
    timm_vit.with_own_form,
    TIMM,
    _prepared,
)
