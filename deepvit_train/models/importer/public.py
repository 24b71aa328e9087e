"""Bring public weights of vision transformers into timm's names, by timm's own function.

timm's `checkpoint_filter_fn` reads CLIP of OpenAI and of OpenCLIP, DINOv2, TIPSv2, RADIO, DeiT III and old
timm. What it drops in silence is named here, so that nothing else is lost.
"""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import torch
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from deepvit_train.error import CheckpointError
from deepvit_train.run.tensor import listed

# A file with one of these names is read as timm's.
MARK = (
    r"^blocks\.\d+\.attn\.qkv\.weight$|^visual\.(class_embedding$|trunk\.)|^vision_encoder\.|^radio_model\."
)

# Parts of a file that a vision transformer has no use for: decoders and the heads of pre-training.
UNUSED = (
    r"mask_token|masked_embed"  # DINOv2, iBOT, MAE
    r"|decoder_(embed|pos_embed|blocks|norm|pred)(\..+)?"  # MAE
    r"|(head|dino_head|ibot_head)\.(mlp|last_layer)\..+"  # DINO, DINOv2
    r"|head_dist\.(weight|bias)"  # DeiT's second head
    r"|.*pre_logits.*"  # timm's models before 2022
)
TEXT = (
    r"|(transformer|text|text_model)\..+|token_embedding\.weight|positional_embedding|ln_final\..+"
    r"|text_projection|logit_scale|logit_bias|input_resolution|context_length|vocab_size"
)
# Of files that hold more than a vision transformer: the mark, what timm reads, and what has no use.
PARTS = (
    (r"visual\.class_embedding", r"visual\..+", UNUSED + TEXT),
    (r"visual\.trunk\..+", r"visual\.(trunk\..+|head\.proj\.weight)", UNUSED + TEXT),
    (
        r"vision_encoder\..+",
        r"vision_encoder\..+",
        r"text_encoder\..+|temperature|logit_scale|vision_encoder\.mask_token",
    ),
    (
        r"radio_model\.model\.patch_generator\..+",
        r"radio_model\.model\.(patch_generator\.(embedder\.weight|pos_embed|cls_token\.token)|blocks\..+)",
        r"radio_model\.(input_conditioner\..+|summary_idxs|adaptors\..+)|input_conditioner\..+|summary_idxs",
    ),
)
KERNELS = ("patch_embed.proj.weight", "visual.conv1.weight", "patch_generator.embedder.weight")


def in_timms_form(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under timm's present names, and the names of those that were left out.

    Raises CheckpointError where timm's function can't convert them.
    """
    part = next((part for part in PARTS if any(re.fullmatch(part[0], name) for name in tensors)), None)
    _, read, unused = part or ("", ".+", UNUSED)
    left_out = [name for name in tensors if re.fullmatch(unused, name)]
    rest = {name for name in tensors if not re.fullmatch(f"{unused}|{read}", name)}
    given = {name: value for name, value in tensors.items() if name not in rest}
    if whole := [
        name for name, value in given.items() if not (name in left_out or value.is_floating_point())
    ]:
        raise CheckpointError(listed("of another number type than floats", whole))  # a sum would hide it
    try:
        found = checkpoint_filter_fn(dict(given), _stand_in(given), adapt_layer_scale=True)  # pyright: ignore
    except Exception as error:  # of names without their counterpart, or of shapes that do not fit
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"can't be converted by timm ({reason})") from None
    _check_none_is_lost({name: given[name] for name in given if name not in left_out}, found, rest)
    form = {name: value for name, value in found.items() if not re.fullmatch(UNUSED, name)}
    left_out += [name for name in found if name not in form and name not in left_out]
    return form | {name: tensors[name] for name in rest}, left_out


def _check_none_is_lost(given: dict[str, Tensor], found: dict[str, Tensor], rest: set[str]) -> None:
    """Raise CheckpointError where two names of a file become one, of which timm would keep the last."""
    kept = {id(value) for value in found.values()}
    lost = [name for name, value in given.items() if "blocks." in name and id(value) not in kept]
    lost += sorted(rest & found.keys())
    lost += ["reg_token"] * ({"reg_token", "register_tokens"} <= given.keys())
    if lost:
        raise CheckpointError(listed("holds under two names", lost))


def _stand_in(tensors: dict[str, Tensor]) -> SimpleNamespace:
    """Return what timm's function asks of a model: the file's own sizes, so that nothing is resampled."""
    name = next((name for name in tensors if name.endswith(KERNELS)), None)
    shape = (1, 3, 1, 1) if name is None else tuple(tensors[name].shape)
    if len(shape) == 2:  # flattened patches of three channels
        side = math.isqrt(shape[1] // 3)
        shape = (shape[0], 3, side, side)
    with torch.device("meta"):
        return SimpleNamespace(
            patch_embed=SimpleNamespace(proj=SimpleNamespace(weight=torch.empty(shape))),
            pos_embed=None,
            head=nn.Linear(1, 1),
        )
