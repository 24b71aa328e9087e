"""Compare the model with vit-pytorch, timm and the formula; compile and export it."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import cycle

import pytest
import timm
import torch
from timm.layers import DiffAttention
from timm.models.cait import TalkingHeadAttn
from torch import Tensor, nn
from vit_pytorch.deepvit import DeepViT as VitPytorchDeepViT

from deepvit_train.config.model import AttentionConfig, ThetaInit, ThetaNorm
from deepvit_train.config.preset import Architecture, attention_preset, choices, model_preset
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT, ReAttention, TalkingHeads
from deepvit_train.models.attention import build_attention
from deepvit_train.models.importer import vit_pytorch
from deepvit_train.models.importer.authors import LAYOUT as AUTHORS
from deepvit_train.models.keyword import vit_pytorch_architecture
from deepvit_train.models.summary import count_parameters
from tests.models.reference import authors_logits, authors_state

SHAPE = {"image_size": 16, "patch_size": 4, "num_classes": 5}
SHAPE |= {"dim": 24, "depth": 3, "heads": 3, "mlp_dim": 40}
FORMS = ["self", *(name for name in choices("attn") if name != "self")]
MIXING = [name for name in FORMS if attention_preset(name).kind not in ("self", "differential")]
# Parameters with 1000 classes, counted on the authors' code; the plain ViTs lack H * H + H + 2 H a block.
PARAMETERS = {
    "deepvit_16b": 24_426_664,
    "deepvit_24b": 36_261_448,
    "deepvit_32b": 48_096_232,
    "deepvit_s": 27_312_632,
    "deepvit_l": 58_883_708,
    "deepvit_l_384": 59_043_308,
    "vit_16b": 24_426_664 - 16 * 180,
    "vit_24b": 36_261_448 - 24 * 180,
    "vit_32b": 48_096_232 - 32 * 180,
    # By hand: patches, tokens and head, and 12 times attention, MLP of ratio 3, norms and Theta.
    "deepvit_12b": 769 * 384
    + 198 * 384
    + 2 * 384
    + 385_000
    + 12 * (4 * 384 * 385 + 2 * 3 * 384**2 + 4 * 384 + 4 * 384 + 180),
    **{f"{kind}_{size}": None for kind in ("vit", "deit") for size in ("tiny", "small", "base")},  # as timm
}


def images_of(size: int = 16, count: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def attention(name: str, **changes: object) -> AttentionConfig:
    return replace(attention_preset(name), **changes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_presets_have_the_parameters_of_the_authors_code_or_timms(name: str) -> None:
    with torch.device("meta"):
        model = DeepViT(model_preset(name), num_classes=1000)
        expected = PARAMETERS[name] or count_parameters(timm.create_model(f"{name}_patch16_224"))
    assert count_parameters(model) == expected


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_the_common_shapes_are_those_of_timm(kind: str, size: str) -> None:
    """Names and shapes of the tensors, the heads, and what is expected of an image."""
    architecture = model_preset(f"{kind}_{size}")
    with torch.device("meta"):
        ours = DeepViT(architecture, num_classes=1000)
        theirs = timm.create_model(f"{kind}_{size}_patch16_224")
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }
    assert architecture.model.heads == theirs.blocks[0].attn.num_heads
    wanted, said = theirs.default_cfg, architecture.model
    assert (tuple(said.mean), tuple(said.std)) == (wanted["mean"], wanted["std"])
    assert (said.crop_pct, said.interpolation) == (wanted["crop_pct"], wanted["interpolation"])


def test_every_shipped_preset_is_counted() -> None:
    assert set(choices("model")) == {*PARAMETERS, "digits"}


VIT_PYTORCH_SHAPES = [
    {},
    {"dim_head": 8, "depth": 1, "heads": 1},
    {"image_size": 24, "patch_size": 8, "dim": 20, "heads": 4, "dim_head": 7, "mlp_dim": 31},
    {"channels": 1, "depth": 5},
]


def outcome(model: nn.Module, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradient of their weighted sum by parameter, under their own names; in float64."""
    logits = model(images)
    (logits * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if not isinstance(model, DeepViT):
        gradients = vit_pytorch.LAYOUT.translate(gradients)[0].tensors
    return {name: value.detach().double() for name, value in {"logits": logits, **gradients}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("shape", VIT_PYTORCH_SHAPES)
def test_vit_pytorchs_keywords_build_its_model(shape: dict[str, int], pool: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = VitPytorchDeepViT(**{**SHAPE, **shape}, pool=pool).to(dtype)
    ours = DeepViT(**{**SHAPE, **shape}, pool=pool).to(dtype)
    exact = copy.deepcopy(theirs).double()
    translated, unread = vit_pytorch.LAYOUT.translate(theirs.state_dict())
    state = translated.tensors
    assert not unread
    ours.load_state_dict(state)
    size, channels = shape.get("image_size", 16), shape.get("channels", 3)
    inputs = torch.randn(3, channels, size, size, dtype=dtype), torch.randn(3, 5, dtype=dtype)
    found, expected = outcome(ours, *inputs), outcome(theirs, *inputs)
    truth = outcome(exact, *(each.double() for each in inputs))
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in truth.values())
    for name, value in found.items():
        # A gradient that is zero but for rounding is compared on the scale of the others.
        scale = truth[name].abs().max().clamp(min=1e-3 * largest)
        apart, own_error = (
            ((value - other).abs().max() / scale).item() for other in (expected[name], truth[name])
        )
        if dtype == torch.float64:
            assert apart < 1e-10, name
        elif name == "logits":
            assert apart < 1e-5
        else:
            # Theta's gradient is a small difference of large sums, so single precision rounds it by an amount
            # that depends on the processor: up to 2.7e-5 here over 12 seeds, up to 5e-4 in vit-pytorch.
            assert own_error < 1e-4, (name, own_error)


def test_vit_pytorchs_keywords_start_as_its_model() -> None:
    ours = DeepViT(**{**SHAPE, "dim": 128, "heads": 16})
    theirs = VitPytorchDeepViT(**{**SHAPE, "dim": 128, "heads": 16})
    expected = vit_pytorch.LAYOUT.translate(theirs.state_dict())[0].tensors
    for name, value in ours.state_dict().items():
        assert value.shape == expected[name].shape
        if value.numel() > 1000:
            assert value.std().item() == pytest.approx(expected[name].std().item(), rel=0.15), name
        elif value.numel() == 256:  # Theta
            assert 0.8 < value.std().item() < 1.2


def test_keywords_and_an_architecture_build_the_same_model() -> None:
    keywords = {name: value for name, value in SHAPE.items() if name != "num_classes"}
    architecture = vit_pytorch_architecture(**keywords)
    assert architecture.model.mlp_dim == SHAPE["mlp_dim"]
    states = []
    for build in (lambda: DeepViT(architecture, 5), lambda: DeepViT(**SHAPE)):
        torch.manual_seed(0)
        states.append(build().state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"depht": 3}, ConfigError, "depht: no such keyword; did you mean 'depth'"),
        ({"pool": "max"}, ConfigError, "'max' is not one of cls, mean"),
        ({"dim": 0}, ConfigError, "model.dim=0: must be at least 1"),
        ({"image_size": 18}, ConfigError, "nearest: model.image_size=16"),
        ({"architecture": model_preset("vit_16b")}, TypeError, "an architecture, or vit-pytorch's keywords"),
    ],
)
def test_a_mistake_in_the_keywords_is_named(
    changes: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        DeepViT(**{**SHAPE, **changes})
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'depth'"):
        DeepViT(**{name: value for name, value in SHAPE.items() if name != "depth"})


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "init_values": 0.3}])
def test_the_plain_form_is_timms(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    theirs = timm.create_model("vit_tiny_patch16_224", **shape, **options).eval()
    ours = DeepViT(
        **{**SHAPE, "mlp_dim": 96, "dim_head": 8},
        attn="self",
        stem="conv",
        init="vit",
        qkv_bias=bool(options.get("qkv_bias", True)),
        layer_scale=options.get("init_values"),
        norm_eps=1e-6,
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(images_of()), theirs(images_of()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.forward_features(images_of()), theirs.forward_features(images_of()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("from_block", [0, 1])
@pytest.mark.parametrize("transform_scale", [False, True])
def test_the_paper_form_trains_by_its_batch_statistics(from_block: int, transform_scale: bool) -> None:
    state = authors_state(from_block=from_block)
    attn = attention("reattention", from_block=from_block, transform_scale=transform_scale)
    model = DeepViT(
        **{**SHAPE, "mlp_dim": 72, "dim_head": 8}, attn=attn, stem="conv", qkv_bias=True, norm_eps=1e-6
    ).double()  # fmt: skip
    tensors = AUTHORS.translate(state)[0].tensors
    model.load_state_dict(tensors)
    images = images_of(count=4, dtype=torch.float64)
    options = {"heads": 3, "transform_scale": transform_scale}
    torch.testing.assert_close(model.eval()(images), authors_logits(state, images, **options))

    noted: dict[str, tuple[Tensor, Tensor]] = {}
    leaves = {name: value.requires_grad_(value.is_floating_point()) for name, value in state.items()}
    expected = authors_logits(leaves, images, batch_statistics=noted, **options)
    logits = model.train()(images)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    logits.square().sum().backward()
    expected.square().sum().backward()
    graded = {n: v.grad for n, v in leaves.items() if v.grad is not None}
    gradients = AUTHORS.translate(graded)[0].tensors
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        # The norm takes Theta's bias out again, which leaves it rounding for a gradient.
        scale = gradients[name].abs().max().clamp(min=1e-6 * largest)
        torch.testing.assert_close(parameter.grad / scale, gradients[name] / scale, rtol=1e-6, atol=1e-6)

    count = 4 * 17 * 17
    for index in range(from_block, 3):
        mean, variance = (value.detach() for value in noted[f"blocks.{index}"])
        before = {
            what: state[f"blocks.{index}.attn.var_norm.running_{what}"].detach() for what in ("mean", "var")
        }
        norm = model.blocks[index].attn.norm
        torch.testing.assert_close(norm.running_mean, 0.9 * before["mean"] + 0.1 * mean)
        unbiased = variance * count / (count - 1)
        torch.testing.assert_close(norm.running_var, 0.9 * before["var"] + 0.1 * unbiased)


def test_talking_heads_are_caits() -> None:
    torch.manual_seed(0)
    theirs = TalkingHeadAttn(24, num_heads=3, qkv_bias=True)
    shape = replace(model_preset("digits").model, dim=24, heads=3, head_dim=8)
    ours = TalkingHeads(Architecture(shape, attention("talking_heads")), index=0)
    assert (ours.logit_theta.abs().max(), ours.theta.abs().max()) < (0.1, 0.1)
    with torch.no_grad():
        for linear in (theirs.proj_l, theirs.proj_w):
            linear.weight.add_(torch.eye(3))
    shared = {name: value for name, value in theirs.state_dict().items() if not name.startswith("proj_")}
    ours.load_state_dict(
        {
            **shared,
            "proj.weight": theirs.proj.weight,
            "proj.bias": theirs.proj.bias,
            "logit_theta": theirs.proj_l.weight.t(),
            "logit_bias": theirs.proj_l.bias,
            "theta": theirs.proj_w.weight.t(),
            "theta_bias": theirs.proj_w.bias,
        }
    )
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("index", [0, 5])
def test_differential_attention_is_timms(index: int) -> None:
    torch.manual_seed(0)
    theirs = DiffAttention(48, num_heads=3, qkv_bias=True, depth=index)
    shape = replace(model_preset("digits").model, dim=48, heads=3, head_dim=16, depth=6)
    ours = build_attention(Architecture(shape, attention("differential")), index)
    with torch.no_grad():
        for parameter in theirs.parameters():  # away from norms of 1
            parameter += 0.3 * torch.randn_like(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.forward_with_maps(x)[0], theirs(x), rtol=1e-5, atol=1e-6)


def test_differential_attention_needs_even_heads() -> None:
    with pytest.raises(ConfigError, match=r"heads, which are 33 wide; nearest: model\.head_dim=34"):
        DeepViT(Architecture(replace(model_preset("deepvit_s").model, depth=2), attention("differential")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", MIXING)
def test_an_identity_theta_without_norm_is_the_plain_vit(form: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = DeepViT(**SHAPE, attn="self").to(dtype).eval()
    attn = attention(form, norm=ThetaNorm.none, theta_init=ThetaInit.identity)
    mixing = DeepViT(**SHAPE, attn=attn).to(dtype).eval()
    fresh = mixing.load_state_dict(plain.state_dict(), strict=False)
    assert not fresh.unexpected_keys
    assert all(".attn." in name for name in fresh.missing_keys)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(mixing(images_of(dtype=dtype)), plain(images_of(dtype=dtype)), **tolerance)


def test_normed_queries_and_keys_have_the_type_of_values() -> None:
    class InFloat32(nn.Module):
        """A norm as autocast runs it on a GPU."""

        def forward(self, x: Tensor) -> Tensor:
            return x.float()

    attn = build_attention(model_preset("digits"), 0).bfloat16()
    attn.q_norm = attn.k_norm = InFloat32()
    q, k, v = attn._heads(torch.randn(2, 5, attn.qkv.in_features, dtype=torch.bfloat16))
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16


def test_registers_are_read_by_no_head() -> None:
    torch.manual_seed(0)
    for pool in ("cls", "mean"):
        model = DeepViT(**SHAPE, registers=3, pool=pool).eval()
        tokens = model.forward_features(images_of())
        assert tokens.shape == (2, 20, 24)
        logits = model.forward_head(tokens)
        tokens[:, 1:4] = 7.0
        assert torch.equal(model.forward_head(tokens), logits)
        tokens[:, 0] = 7.0
        assert not torch.allclose(model.forward_head(tokens), logits)


def test_one_theta_can_serve_all_blocks() -> None:
    shared = attention("reattention", theta_shared=True, from_block=1)
    model = DeepViT(**SHAPE, attn=shared)
    names = [name for name, _ in model.named_parameters() if "theta" in name]
    assert names == ["blocks.1.attn.theta", "blocks.1.attn.theta_bias"]
    assert [name for name in model.state_dict() if "theta" in name] == names
    mixing = [module for module in model.modules() if isinstance(module, ReAttention)]
    assert {id(module.mixer.theta) for module in mixing} == {id(model.blocks[1].attn.theta)}
    assert len({id(module.norm) for module in mixing}) == 2


@pytest.mark.parametrize(
    ("form", "stem"), list(zip(FORMS, cycle(["conv", "cnn", "rearrange"]), strict=False))
)
def test_each_form_exports(form: str, stem: str) -> None:
    torch.manual_seed(0)
    shared = attention(form, theta_shared=stem == "cnn" and form in MIXING, from_block=1)
    model = DeepViT(**SHAPE, attn=shared, stem=stem, init="vit", registers=1, layer_scale=0.1).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images_of(),), dynamic_shapes={"images": {0: batch}})
    images = images_of(count=5)
    torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "form", [*FORMS[:2], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[2:])]
)
def test_each_form_compiles_whole(form: str) -> None:
    torch.manual_seed(0)
    model = DeepViT(**{**SHAPE, "depth": 2}, attn=form, stem="conv", init="vit").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(images_of())
    logits = compiled(images_of())
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("model"))
def test_each_preset_compiles_whole_and_exports(name: str) -> None:
    architecture = model_preset(name)
    small = replace(architecture.model, depth=3, drop_path=0.0)
    mixing = replace(architecture.attn, from_block=min(1, architecture.attn.from_block))
    torch.manual_seed(0)
    model = DeepViT(Architecture(small, mixing), num_classes=10).eval()
    images = images_of(small.image_size, count=1)
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-3, atol=1e-4)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), expected, rtol=1e-3, atol=1e-4)
