"""Check what docs/add-an-attention.md promises of every form of attention in configs/attn/."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepvit_train.config.compose import compose_command
from deepvit_train.config.model import ThetaNorm
from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.config.shipped import attention_kinds
from deepvit_train.error import ConfigError
from deepvit_train.models import Attention, DeepViT, ReAttention, TalkingHeads
from deepvit_train.models.reattention import Centring
from deepvit_train.training.optimizer import build_optimizer
from deepvit_train.training.watch import mixing_scalars

SHAPE = replace(model_preset("digits").model, depth=2)
KINDS = attention_kinds()
OWN_RATE = ["optim.mixing_rate=10", "optim.weight_decay=0.5", "optim.decay_theta=false"]
ZERO = 1e-12  # of the largest gradient in float64: less is rounding


def built(attention: str | type[Attention], **changes: Any) -> DeepViT:
    """A small model in float64 whose blocks have a form of attention."""
    torch.manual_seed(0)
    kind = attention if isinstance(attention, str) else "reattention"
    architecture = Architecture(SHAPE, replace(attention_preset(kind), **changes))
    model = DeepViT(architecture, num_classes=5)
    if not isinstance(attention, str):
        for index, block in enumerate(model.blocks):
            block.attn = attention(architecture, index)
    model.double().train()
    return model


def vanishing(model: DeepViT) -> set[str]:
    """Name the parameters whose gradient is zero in exact arithmetic.

    - A BatchNorm subtracts the mean over images and maps, and with it the bias that was added before.
    - A Centring subtracts the mean of each row, and so the bias too.
    - A softmax stays the same where one number is added to a whole row of logits.
    """
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, ReAttention) and (
            isinstance(module.norm, nn.BatchNorm2d) or type(module.norm) is Centring
        ):
            found.add(f"{name}.theta_bias")
        if isinstance(module, TalkingHeads):
            found.add(f"{name}.logit_bias")
    return found & {name for name, _ in model.named_parameters()}


def zero_gradients(model: DeepViT) -> set[str]:
    """Name the parameters without a gradient, or with one of zeros, after a step with random targets."""
    images, targets = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.randint(5, (8,))
    step = torch.optim.SGD(
        model.parameters(), lr=0.1
    )  # what starts at zero may keep others' gradient at zero
    for _ in range(2):
        step.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        step.step()
    sizes = {
        name: 0.0 if parameter.grad is None else parameter.grad.abs().max().item()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {name for name, size in sizes.items() if size <= ZERO * max(sizes.values())}


class Gated(ReAttention):
    """The form of docs/add-an-attention.md."""

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__(architecture, index)
        self.gate = nn.Parameter(torch.full((self.heads,), -2.0))

    @property
    def share(self) -> Tensor:
        return self.gate.sigmoid()[:, None, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.share * super().attend(q, k, v) + (1 - self.share) * Attention.attend(self, q, k, v)

    def mixed(self, maps: Tensor) -> Tensor:
        return self.share * super().mixed(maps) + (1 - self.share) * maps


class Unused(Gated):
    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__(architecture, index)
        self.spare = nn.Parameter(torch.zeros(self.heads))


class Detached(Gated):
    @property
    def share(self) -> Tensor:
        return self.gate.detach().sigmoid()[:, None, None]


class Rounded(Gated):
    """A gradient of zeros reaches the gate."""

    @property
    def share(self) -> Tensor:
        return self.gate.round().sigmoid()[:, None, None]


class Disagreeing(Gated):
    def mixed(self, maps: Tensor) -> Tensor:
        return (1 - self.share) * super().mixed(maps) + self.share * maps


class Stray(Gated):
    """What an optimizer and a checkpoint do not see."""

    def __init__(self, architecture: Architecture, index: int) -> None:
        super().__init__(architecture, index)
        self.plain = torch.zeros(self.heads)
        self.trained = torch.zeros(self.heads, requires_grad=True)
        self.several = [nn.Parameter(torch.zeros(1))]
        self.layers = {"one": nn.Linear(2, 2)}
        self.count = torch.tensor(1)


def disagreements(model: DeepViT) -> list[str]:
    """Name the forms whose `attend` and `mixed` compute something else from the same q, k and v."""
    found = []
    x = torch.randn(2, 17, SHAPE.dim, dtype=torch.float64)
    for training in (True, False):
        for module in model.train(training).modules():
            if isinstance(module, Attention):
                with torch.no_grad():
                    for parameter in module.mixing_parameters():  # away from a start that hides a difference
                        parameter += 0.3 * torch.randn_like(parameter)
                    apart = (module(x) - module.forward_with_maps(x)[0]).abs().max().item()
                if not apart < 1e-9:
                    mode = "training" if training else "evaluation"
                    found.append(
                        f"attend and mixed of {type(module).__name__} disagree by {apart:.2g} in {mode}: "
                        "attend(q, k, v) must be mixed(softmax_maps(q, k)) @ v"
                    )
    return found


def strays(model: DeepViT) -> list[str]:
    """Name the attributes with tensors that no optimizer trains and no checkpoint keeps."""
    found = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            parts = value if isinstance(value, (list, tuple)) else [value]
            parts = list(value.values()) if isinstance(value, dict) else parts
            named = f"{type(module).__name__}.{name}"
            if any(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
                found.append(
                    f"{named} is a plain tensor: nn.Parameter (or nn.ParameterList) trains and saves it, "
                    "register_buffer saves it"
                )
            elif isinstance(value, (list, dict)) and any(isinstance(part, nn.Module) for part in parts):
                found.append(f"{named} holds modules: nn.ModuleList or nn.ModuleDict trains and saves them")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    model = built(kind)
    assert zero_gradients(model) <= vanishing(model), "no gradient reaches these parameters"


@pytest.mark.parametrize("norm", list(ThetaNorm))
@pytest.mark.parametrize("kind", ["reattention", "reattention_vit_pytorch", "talking_heads"])
def test_a_gradient_is_zero_where_the_formula_says_so(kind: str, norm: ThetaNorm) -> None:
    model = built(kind, norm=norm)
    assert zero_gradients(model) == vanishing(model)


def test_a_parameter_that_no_gradient_reaches_is_found() -> None:
    assert zero_gradients(built(Gated)) == vanishing(built(Gated))
    for form, name in ((Unused, "spare"), (Detached, "gate"), (Rounded, "gate")):
        found = zero_gradients(model := built(form)) - vanishing(model)
        assert found == {f"blocks.{index}.attn.{name}" for index in range(2)}, form


@pytest.mark.parametrize("kind", KINDS)
def test_attend_and_mixed_agree(kind: str) -> None:
    if found := disagreements(built(kind)):
        pytest.fail("\n".join(found))


def test_a_disagreement_is_said_in_words() -> None:
    assert not disagreements(built(Gated))
    first, *_ = disagreements(built(Disagreeing))
    assert re.match(r"attend and mixed of Disagreeing disagree by \d\S* in training: attend\(q", first)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_is_left_out_of_training_and_checkpoints(kind: str) -> None:
    if found := strays(built(kind)):
        pytest.fail("\n".join(found))


def test_a_tensor_that_is_left_out_is_said_in_words() -> None:
    assert not strays(built(Gated))
    said = strays(built(Stray))[:4]
    for line, name in zip(said, ("plain", "trained", "several"), strict=False):
        assert line.startswith(f"Stray.{name} is a plain tensor: nn.Parameter ")
    assert said[3].startswith("Stray.layers holds modules: nn.ModuleList ")
    assert len(strays(built(Stray))) == 8  # of two blocks


def form_of(method: str, give: Any) -> type[Attention]:
    """A form one of whose methods gives something else."""
    return type("Mine", (ReAttention,), {method: lambda self, *inputs: give(*inputs)})


@pytest.mark.parametrize(
    ("method", "give", "said"),
    [
        ("attend", lambda q, k, v: v.transpose(1, 2), "shape (2, 17, 4, 16); expected (B, H, N, K) = "),
        ("attend", lambda q, k, v: v[0], "shape (4, 17, 16); expected (B, H, N, K) = (2, 4, 17, 16)"),
        ("attend", lambda q, k, v: (v, q), "a tuple; expected (B, H, N, K) = (2, 4, 17, 16)"),
        ("attend", lambda q, k, v: None, "a NoneType; expected (B, H, N, K) = (2, 4, 17, 16)"),
        ("mixed", lambda maps: maps[:, :1], "shape (2, 1, 17, 17); expected (B, H, N, N) = (2, 4, 17, 17)"),
        ("softmax_maps", lambda q, k: q, "shape (2, 4, 17, 16); expected (B, H, N, N) = (2, 4, 17, 17)"),
    ],
)
def test_a_wrong_shape_is_said_where_it_arises(method: str, give: Any, said: str) -> None:
    attention: Any = built(form_of(method, give)).blocks[0].attn
    x = torch.randn(2, 17, SHAPE.dim, dtype=torch.float64)
    with pytest.raises(ConfigError, match=re.escape(f"Mine.{method} gave {said}")):
        attention(x) if method == "attend" else attention.forward_with_maps(x)


def test_what_a_form_adds_learns_at_the_rate_of_what_mixes_heads() -> None:
    class WithMatrix(Gated):
        def __init__(self, architecture: Architecture, index: int) -> None:
            super().__init__(architecture, index)
            self.between = nn.Parameter(torch.eye(self.heads))

    model = built(WithMatrix)
    optim = compose_command("train", OWN_RATE).optim
    groups = {
        id(parameter): group
        for group in build_optimizer(model, optim).param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        mixes = bool(re.search(r"\.attn\.(theta|norm|gate|between)", name))
        assert groups[id(parameter)].get("lr_scale", 1.0) == (10 if mixes else 1), name
        decays = not mixes and parameter.ndim >= 2 and "cls" not in name and "pos" not in name
        assert groups[id(parameter)]["weight_decay"] == (0.5 if decays else 0), name


def test_muon_leaves_what_mixes_heads_to_adamw() -> None:
    model = built("talking_heads")
    groups = build_optimizer(model, compose_command("train", ["optim=muon"]).optim).param_groups
    treated = {id(parameter) for group in groups if group["use_muon"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in treated}
    assert names == {
        f"blocks.{index}.{layer}.weight"
        for index in range(2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }


def test_the_parameters_that_mix_are_logged_over_all_blocks() -> None:
    model = built(Gated)
    for number, block in enumerate(model.blocks):
        nn.init.constant_(block.attn.gate, 1.0 + number)
    found = mixing_scalars(model)
    assert found["mixing/gate_mean"] == 1.5
    assert found["mixing/gate_std"] == 0.5
    of = {name.partition("/")[2].rpartition("_")[0] for name in found}
    assert of == {"theta", "theta_bias", "gate", "norm.weight", "norm.bias"}
    assert mixing_scalars(built("self")) == {}
