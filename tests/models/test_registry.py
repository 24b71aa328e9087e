"""Use the presets through timm's own tools, beside timm's VisionTransformer."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor

from deepvit_train.config.preset import choices
from deepvit_train.models import DeepViT

SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def create(name: str = "vit_16b", **changes: object) -> DeepViT:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **changes}).eval()


def pair() -> tuple[DeepViT, VisionTransformer]:
    """The same plain ViT from the registry and from timm."""
    ours = create()
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL, mlp_ratio=3.0).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_importing_the_models_registers_every_preset() -> None:
    script = (
        "import timm; assert not timm.list_models('deepvit*'); import deepvit_train.models; "
        "print(*timm.list_models(module='registry'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name for name in choices("model") if name != "digits"]


def test_timms_keywords_are_those_of_timm() -> None:
    model = create(
        "deepvit_16b",
        in_chans=1,
        drop_path_rate=0.3,
        drop_rate=0.2,
        proj_drop_rate=0.1,
        attn_drop_rate=0.4,
        pos_drop_rate=0.5,
        global_pool="avg",
        reg_tokens=2,
        init_values=0.1,
        mlp_ratio=2.0,
        qkv_bias=False,
    )
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    block = model.blocks[2]
    assert block.drop_path.drop_prob == pytest.approx(0.3)
    assert (block.attn.attn_dropout, block.mlp.drop1.p, model.pos_drop.p, model.head_drop.p) == (
        0.4,
        0.1,
        0.5,
        0.2,
    )
    assert (block.mlp.fc1.out_features, block.attn.qkv.bias, model.num_prefix_tokens) == (48, None, 3)
    assert block.ls1.gamma[0].item() == pytest.approx(0.1)
    assert create("deepvit_s", attn="talking_heads", from_block=1).blocks[1].attn.logit_theta.shape == (3, 3)
    assert create(img_size=(16, 16), residual_scale=0.5).pos_embed.shape[1] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_sise": 32}, "no such keyword as img_sise; did you mean 'img_size'"),
        ({"img_size": (32, 16)}, "must be square"),
        ({"global_pool": "max"}, "pool=max: unknown"),
        ({"depth": 0}, "must be at least 1"),
        ({"pretrained": True}, "no weights are published"),
    ],
)
def test_a_mistake_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(**changes)


def test_features_and_head_are_timms() -> None:
    ours, theirs = pair()
    assert ours.num_features == ours.head_hidden_size == theirs.head_hidden_size
    assert [dict(info) for info in ours.feature_info] == [
        {key: info[key] for key in ("module", "num_chs", "reduction")} for info in theirs.feature_info
    ]
    for call in (
        lambda model: model(IMAGES),
        lambda model: model.forward_features(IMAGES),
        lambda model: model.forward_head(model.forward_features(IMAGES), pre_logits=True),
    ):
        torch.testing.assert_close(call(ours), call(theirs), rtol=1e-5, atol=1e-5)
    assert ours.no_weight_decay() >= {"pos_embed", "cls_token"}


def same(left: object, right: object) -> None:
    if isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        return
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [1], "stop_early": True, "intermediates_only": True},
        {"return_prefix_tokens": True, "output_fmt": "NLC"},
    ],
)
def test_intermediates_are_timms(options: dict[str, object]) -> None:
    ours, theirs = pair()
    same(ours.forward_intermediates(IMAGES, **options), theirs.forward_intermediates(IMAGES, **options))


@pytest.mark.parametrize("name", ["deepvit_16b", "deepvit_s", "vit_16b"])
def test_features_only(name: str) -> None:
    model = create(
        name, features_only=True, out_indices=(0, 2), **({"from_block": 1} if "deep" in name else {})
    )
    maps = model(IMAGES)
    assert [tuple(each.shape) for each in maps] == [(2, 24, 4, 4)] * 2
    assert model.feature_info.channels() == [24, 24]
    assert model.feature_info.reduction() == [8, 8]
    sum(each.sum() for each in maps).backward()


def test_the_classifier_can_be_replaced_and_dropped() -> None:
    model = create("deepvit_16b")
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(IMAGES).shape == (2, 7)
    assert model.num_classes == 7
    model.reset_classifier(0)
    assert model(IMAGES).shape == (2, 24)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(IMAGES), model.forward_features(IMAGES))
    model.double().reset_classifier(3, "avg")
    assert model(IMAGES.double()).shape == (2, 3)
    unpooled = create(num_classes=0, global_pool="")
    torch.testing.assert_close(unpooled(IMAGES), unpooled.forward_features(IMAGES))


def test_layers_of_layer_wise_decay() -> None:
    model = create("deepvit_16b")
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        first, second = name.split(".")[:2] if "." in name else (name, "")
        # timm counts the final norm among the last block.
        layer = {"blocks": 1 + int(second) if second.isdigit() else 0, "norm": 3, "head": 4}.get(first, 0)
        assert scale[id(parameter)] == 0.5 ** (4 - layer), name


def test_checkpointing_changes_neither_gradients_nor_statistics() -> None:
    states = []
    for enable in (False, True):
        model = create("deepvit_16b", drop_path_rate=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        model(IMAGES).square().sum().backward()
        gradients = {f"{name} (grad)": parameter.grad for name, parameter in model.named_parameters()}
        states.append({**model.state_dict(), **gradients})
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert states[0]["blocks.1.attn.norm.num_batches_tracked"] == 1


def test_the_data_pipeline_of_timm_reads_mean_and_crop() -> None:
    config = timm.data.resolve_model_data_config(timm.create_model("deepvit_l_384", depth=21))
    assert config["input_size"] == (3, 384, 384)
    assert (config["crop_pct"], config["mean"], config["interpolation"]) == (1.0, (0.5, 0.5, 0.5), "bicubic")
