"""Build what re-attention is compared with: a frozen Theta, norms without mixing, larger queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from deepvit_train.config.compose import compose_command
from deepvit_train.config.model import AttentionConfig, ThetaInit, ThetaNorm
from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.models import DeepViT
from deepvit_train.training.optimizer import build_optimizer

SHAPE = replace(model_preset("digits").model, depth=3)


def build(attn: AttentionConfig) -> DeepViT:
    torch.manual_seed(0)
    return DeepViT(Architecture(SHAPE, attn), num_classes=5)


def frozen(**changes: Any) -> AttentionConfig:
    changes = {"theta_frozen": True, "theta_init": ThetaInit.identity} | changes
    return replace(attention_preset("reattention"), **changes)


def test_a_frozen_theta_is_not_trained_and_not_decayed() -> None:
    model = build(frozen())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(model, compose_command("train", ["optim.weight_decay=0.5"]).optim)
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in trained) == ("theta" not in name), name
    for _ in range(2):
        model(torch.randn(4, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert [name for name in before if "theta" in name]
    for name in before:
        assert torch.equal(before[name], after[name]) == ("theta" in name), name


@pytest.mark.parametrize("norm", list(ThetaNorm))
def test_a_frozen_identity_leaves_the_norm_alone(norm: ThetaNorm) -> None:
    """Each head's map is that of plain attention, passed through the norm by itself."""
    model = build(frozen(norm=norm)).double().train()
    attention = model.blocks[0].attn
    with torch.no_grad():
        for parameter in [] if attention.norm is None else attention.norm.parameters():
            parameter.uniform_(0.5, 2.0)
    x = torch.randn(2, 17, 64, dtype=torch.float64)
    q, k, v = attention._heads(x)
    maps = (q @ k.mT / 16**0.5).softmax(dim=-1)
    if norm == ThetaNorm.batch:
        weight, bias = (each[:, None, None] for each in (attention.norm.weight, attention.norm.bias))
        mean, var = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
        maps = (maps - mean) / (var + 1e-5).sqrt() * weight + bias
    elif norm == ThetaNorm.layer:
        maps = nn.functional.layer_norm(
            maps.permute(0, 2, 3, 1), (4,), attention.norm.weight, attention.norm.bias
        ).permute(0, 3, 1, 2)
    elif norm == ThetaNorm.centred:
        maps = attention.norm.gain[:, None, None] * (maps - 1 / 17)
    elif norm == ThetaNorm.attn_scale:
        maps = 1 / 17 + (1 + attention.norm.omega[:, None, None]) * (maps - 1 / 17)
    expected = attention.proj((maps @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["self", "reattention"])
@pytest.mark.parametrize("init", ["vit", "vit_pytorch"])
def test_a_gain_on_queries_and_keys_scales_them_and_no_values(form: str, init: str) -> None:
    models = []
    for gain in (1.0, 4.0):
        torch.manual_seed(0)
        attn = replace(attention_preset(form), qk_gain=gain)
        shape = replace(SHAPE, init=type(SHAPE.init)(init))
        models.append(DeepViT(Architecture(shape, attn), num_classes=5).state_dict())
    plain, sharper = models
    for name in plain:
        expected = plain[name].clone()
        if name.endswith("qkv.weight"):
            expected[:128] *= 4
        assert torch.equal(sharper[name], expected), name


def test_the_keys_are_typed_as_any_other() -> None:
    typed = ["attn=reattention", "attn.theta_frozen=true", "attn.norm=centred", "attn.qk_gain=4"]
    attn = compose_command("train", typed).attn
    assert (attn.theta_frozen, attn.norm, attn.qk_gain) == (True, ThetaNorm.centred, 4.0)
