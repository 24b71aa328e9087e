"""Compute multi-head attention: plain, or with re-attention.

Each form is registered by the name that `kind:` has in a file of configs/attn/. A form of its own module is
in attention_NAME.py (docs/add-an-attention.md).

Shapes: B batch, N tokens, D dim, H heads, K head_dim.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit_train.config.model import AttentionConfig, ThetaInit, ThetaNorm
from deepvit_train.config.preset import Architecture
from deepvit_train.error import ConfigError, nearest
from deepvit_train.models.reattention import (
    AttentionScale,
    Centring,
    HeadMixer,
    mix_heads,
    reattention,
    softmax_maps,
)

# The class of each form that was registered, by its name in configs/attn/.
FORMS: dict[str, type[Attention]] = {}

# The parts of plain attention that have parameters.
PLAIN = {"qkv", "q_norm", "k_norm", "proj"}

_Form = TypeVar("_Form", bound="type[Attention]")


def form(*kinds: str) -> Callable[[_Form], _Form]:
    """Register a class as the form of attention of these names."""

    def register(attention: _Form) -> _Form:
        FORMS.update(dict.fromkeys(kinds, attention))
        return attention

    return register


@form("self")
class Attention(nn.Module):
    """Plain multi-head softmax attention, computed by torch's fused kernels. (B, N, D) -> (B, N, D).

    Args:
        architecture: gives every size.
        index: number of the block that this attention is a part of, from 0.
    """

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__()
        model, dropout = architecture.model, architecture.attn.dropout
        self.heads = model.heads
        self.head_dim = model.width_of_head
        self.attn_dropout = model.dropout if dropout is None else dropout
        self.qkv = nn.Linear(model.dim, 3 * self.heads * self.head_dim, bias=model.qkv_bias)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(self.head_dim, eps=model.norm_eps) if model.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.proj = nn.Linear(self.heads * self.head_dim, model.dim)
        self.proj_drop = nn.Dropout(model.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        return self._output(self._fitting("attend", self.attend(q, k, v), "(B, H, N, K)", v.shape))

    def forward_with_maps(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Do the same as `forward`, and return two kinds of maps as well: (output, before, after).

        `before` are the softmax maps and `after` the maps that multiply V, both (B, H, N, N) and in float32
        at least. Where heads are not mixed they are the same. Softmax maps that are `given` take the place of
        this attention's own.
        """
        q, k, v = self._heads(x)
        with torch.autocast(x.device.type, enabled=False):
            full = torch.promote_types(v.dtype, torch.float32)
            shape = torch.Size([*k.shape[:-1], k.shape[-2]])
            before = self.softmax_maps(q.to(full), k.to(full)) if given is None else given
            before = self._fitting("softmax_maps", before, "(B, H, N, N)", shape)
            after = self._fitting("mixed", self.mixed(before), "(B, H, N, N)", shape)
            out = (after @ v.to(full)).to(v.dtype)
        return self._output(out), before, after

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return what each head reads of the values. (B, H, N, K) three times -> (B, H, N, K)."""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_dropout if self.training else 0.0)

    def softmax_maps(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the softmax maps. (B, H, N, K) twice -> (B, H, N, N)."""
        return softmax_maps(q, k)

    def mixed(self, maps: Tensor) -> Tensor:
        """Return the maps that multiply V, of softmax maps (B, H, N, N): mixed, where heads are mixed."""
        return self._drop(maps)

    def mixing_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of this block that mix its heads: all that plain attention has not.

        They learn at `optim.mixing_rate` times the rate of their block, and their matrices are not decayed
        with `optim.decay_theta=false`. A form whose own parameters do something else overrides this.
        """
        return [
            parameter for name, parameter in self.named_parameters() if name.partition(".")[0] not in PLAIN
        ]

    @torch.no_grad()
    def scale_queries_and_keys(self, gain: float) -> None:
        """Multiply the weights that make queries and keys. Logits grow by the square of the gain."""
        self.qkv.weight[: 2 * self.heads * self.head_dim] *= gain

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Tensor's own methods, because einops takes the host 10 microseconds a call.
        # unbind comes before heads and tokens change places, so that one copy puts the gradients together.
        qkv = self.qkv(x).view(*x.shape[:2], 3, self.heads, self.head_dim).unbind(dim=2)
        q, k, v = (each.transpose(1, 2) for each in qkv)
        # Under autocast a GPU's LayerNorm returns float32. Fused attention casts that back, and so does this.
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def _output(self, out: Tensor) -> Tensor:
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _fitting(self, method: str, found: Tensor, legend: str, shape: torch.Size) -> Tensor:
        """Return what a method of a form gave. Raises ConfigError if that has another shape."""
        if isinstance(found, Tensor) and found.shape == shape:
            return found
        gave = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(
            f"{type(self).__name__}.{method} gave {gave}; expected {legend} = {tuple(shape)} "
            "(docs/add-an-attention.md)"
        )

    def _drop(self, maps: Tensor) -> Tensor:
        return F.dropout(maps, self.attn_dropout, self.training)


@form("reattention", "reattention_vit_pytorch")
class ReAttention(Attention):
    """Attention whose maps are mixed across heads by a learned matrix, then normalised.

    It adds the parameters `theta` (H, H), `theta_bias` (H,) in the paper's form, and those of `norm`. With
    `sync_norm` a BatchNorm trains with the statistics of all ranks' batches. Blocks may share one Theta
    (`attn.theta_shared`): the first block that mixes owns it, and the others `borrow` it. Theta and its bias
    may stay as they start (`attn.theta_frozen`): as the identity, they leave a norm without mixing.

    Source: arXiv 2103.11886, section 4.2. Theta starts as the authors' 1x1 convolution does, or as in
    vit-pytorch.
    """

    theta: Tensor
    theta_bias: Tensor | None

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__(architecture, index)
        attn = architecture.attn
        self.output_scale = self.head_dim**-0.5 if attn.transform_scale else 1.0
        self._lender: tuple[ReAttention, ...] = ()
        if not attn.borrows(index):
            self._build_theta(self.heads, attn)
        for parameter in self.parameters(recurse=False):  # those of `_build_theta`
            parameter.requires_grad_(not attn.theta_frozen)
        self.norm = _build_norm(attn.norm, self.heads)
        self.sync_norm = False

    def borrow(self, lender: ReAttention) -> None:
        """Use the Theta of another block."""
        # In a tuple the lender is no child of this module, so its Theta appears once in the state dict.
        self._lender = (lender,)

    def _build_theta(self, heads: int, attn: AttentionConfig) -> None:
        biased = attn.kind != "reattention_vit_pytorch"
        self.theta = nn.Parameter(torch.empty(heads, heads))
        self.theta_bias = nn.Parameter(torch.zeros(heads)) if biased else None
        if attn.theta_init == ThetaInit.identity:
            nn.init.eye_(self.theta)
        elif self.theta_bias is None:
            nn.init.normal_(self.theta)
        else:
            bound = heads**-0.5
            nn.init.uniform_(self.theta, -bound, bound)
            nn.init.uniform_(self.theta_bias, -bound, bound)

    @property
    def mixer(self) -> ReAttention:
        """Return the module whose Theta this one uses: itself, or its lender."""
        return self._lender[0] if self._lender else self

    @property
    def head_mixer(self) -> HeadMixer:
        """Return how this block mixes its softmax maps."""
        mixer = self.mixer
        return HeadMixer(mixer.theta, mixer.theta_bias, self.norm, self.output_scale)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.attn_dropout if self.training else 0.0
        sync = self.sync_norm and self.training
        return reattention(q, k, v, self.head_mixer, dropout=dropout, sync=sync)

    def mixed(self, maps: Tensor) -> Tensor:
        return mix_heads(self._drop(maps), self.head_mixer)


def build_attention(architecture: Architecture, index: int) -> Attention:
    """Return the attention of block `index`: plain before `attn.from_block`, then of the form `attn.kind`.

    Raises ConfigError for a form that has no class.
    """
    kind = architecture.attn.kind.value if architecture.attn.mixes(index) else "self"
    return attention_class(kind)(architecture, index)


def attention_class(kind: str) -> type[Attention]:
    """Return the class of a form of attention. Raises ConfigError if there is none."""
    module = f"attention_{kind}"
    if kind not in FORMS and importlib.util.find_spec(f"deepvit_train.models.{module}") is not None:
        importlib.import_module(f"deepvit_train.models.{module}")
    if kind not in FORMS:
        raise ConfigError(
            f"attn.kind={kind}: no class has @form({kind!r}); its place is deepvit_train/models/{module}.py "
            f"(docs/add-an-attention.md){nearest(kind, FORMS)}"
        )
    return FORMS[kind]


_NORMS: dict[ThetaNorm, type[nn.Module]] = {
    ThetaNorm.batch: nn.BatchNorm2d,
    ThetaNorm.layer: nn.LayerNorm,
    ThetaNorm.centred: Centring,
    ThetaNorm.attn_scale: AttentionScale,
}


def _build_norm(norm: ThetaNorm, heads: int) -> nn.Module | None:
    return None if norm == ThetaNorm.none else _NORMS[norm](heads)
