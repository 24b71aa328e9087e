"""The model that is exported computes the same as the model in evaluation, with torch's operations alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from deepvit_train.commands.export_check import CheckImages, their_answers
from deepvit_train.commands.export_file import write_onnx, write_pt2
from deepvit_train.commands.export_model import plain_model, traced
from deepvit_train.commands.export_timm import check_timm, timm_tensors
from deepvit_train.config.export import NumberType
from deepvit_train.config.model import Act, AttentionKind, Pool, Stem, ThetaNorm
from deepvit_train.config.preset import Architecture, choices, model_preset
from deepvit_train.error import ConfigError
from deepvit_train.evaluation.calibration import reattention_norms
from deepvit_train.models import DeepViT


def small(preset: str = "deepvit_16b", depth: int = 3, **changes: object) -> Architecture:
    """A preset with its own attention, stem and residuals, but few and narrow blocks and small images."""
    architecture = model_preset(preset)
    model, attn = architecture.model, architecture.attn
    sizes = {"depth": depth, "dim": 24, "heads": 4, "patch_size": 8, "image_size": 32} | {
        name: value for name, value in changes.items() if hasattr(model, name)
    }
    kept = {"from_block": min(attn.from_block, depth - 2)} | {
        name: value for name, value in changes.items() if not hasattr(model, name)
    }
    return Architecture(replace(model, **sizes), replace(attn, **kept))


CASES = {
    **{preset: small(preset) for preset in choices("model") if preset != "base"},
    "vit_pytorch": small(kind=AttentionKind.reattention_vit_pytorch, norm=ThetaNorm.layer, pool=Pool.mean),
    "rearrange": small(stem=Stem.rearrange),
    "layer_norm_and_scale": small(norm=ThetaNorm.layer, transform_scale=True),
    "no_norm": small(norm=ThetaNorm.none),
    "centred_and_scale": small(norm=ThetaNorm.centred, transform_scale=True),
    "attn_scale": small(norm=ThetaNorm.attn_scale),
    "shared_theta": small(theta_shared=True),
    "talking_heads": small(kind=AttentionKind.talking_heads, norm=ThetaNorm.none),
    "talking_heads_shared": small(kind=AttentionKind.talking_heads, norm=ThetaNorm.batch, theta_shared=True),
    "self": small(kind=AttentionKind.self),
    "differential": small(kind=AttentionKind.differential),
    "registers": small(registers=3),
    "registers_mean": small(registers=3, pool=Pool.mean),
    "layer_scale": small(layer_scale=0.1),
    "head_dim": small(head_dim=5),
    "mean_patches": small(pool=Pool.mean_patches, registers=2),
    "qk_norm": small(qk_norm=True, act=Act.gelu_tanh, pre_norm=True),
    "no_class_token": small(class_token=False, pool=Pool.mean, registers=2, act=Act.quick_gelu),
    "no_final_norm": small(class_token=False, pool=Pool.mean_patches, final_norm=False),
}


def trained_like(architecture: Architecture) -> DeepViT:
    """A model whose every number differs from what it starts as, statistics too."""
    torch.manual_seed(0)
    model = DeepViT(architecture, 7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.05, 2.0)
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_plain_model_is_the_model(case: str) -> None:
    model = trained_like(CASES[case]).double()
    plain = plain_model(model.float())
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
        torch.testing.assert_close(plain(images).double(), exact, rtol=1e-4, atol=2e-5)
    assert not list(reattention_norms(plain))


@pytest.mark.parametrize(
    "case", ["deepvit_s", "vit_pytorch", "talking_heads_shared", "differential", "registers"]
)
def test_the_graph_holds_operations_of_torch_alone_and_takes_any_batch(case: str) -> None:
    model = trained_like(CASES[case])
    program = traced(plain_model(model))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in function")) for target in targets), targets
    assert "deepvit_train" not in program.graph_module.code
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=2e-5)


def test_the_model_itself_stays_as_it_is() -> None:
    model = trained_like(CASES["deepvit_s"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain_model(model)
    assert model.training
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({}, {"global_pool": "token"}),
        ({"registers": 3, "layer_scale": 0.1}, {"global_pool": "token", "reg_tokens": 3, "init_values": 0.1}),
        ({"pool": Pool.mean_patches}, {"global_pool": "avg", "fc_norm": True}),
        (
            {"pool": Pool.mean_normed_patches, "registers": 2},
            {"global_pool": "avg", "fc_norm": False, "reg_tokens": 2},
        ),
        ({"qkv_bias": False}, {"qkv_bias": False}),
        (
            {"class_token": False, "pool": Pool.mean_patches, "qk_norm": True, "registers": 2},
            {"class_token": False, "global_pool": "avg", "qk_norm": True, "reg_tokens": 2},
        ),
        ({"final_norm": False, "act": Act.gelu_tanh}, {"final_norm": False, "act_layer": "gelu_tanh"}),
    ],
    ids=str,
)
def test_timm_computes_the_same_from_the_tensors(changes: dict, arguments: dict) -> None:
    architecture = small(kind=AttentionKind.self, norm=ThetaNorm.none, **changes)
    check_timm(architecture)
    model = trained_like(architecture)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 4, "mlp_ratio": 3.0}
    other = timm.create_model("vit_base_patch16_224", num_classes=7, **sizes, **arguments).eval()
    other.load_state_dict(timm_tensors(model))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(other(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "told"),
    [
        (small("deepvit_s"), "attn=reattention can't be written"),
        (small(kind=AttentionKind.self, stem=Stem.cnn), "nothing like model.stem=cnn"),
        (small(kind=AttentionKind.self, pool=Pool.mean), "nothing like model.pool=mean;"),
        (small(kind=AttentionKind.self, residual_scale=0.5), "nothing like model.residual_scale=0.5"),
        (small(kind=AttentionKind.self, norm_eps=1e-5), "nothing like model.norm_eps=1e-05"),
        (small(kind=AttentionKind.self, head_dim=5), "nothing like model.head_dim=5"),
        (small(kind=AttentionKind.self, pre_norm=True), "nothing like model.pre_norm=true"),
    ],
)
def test_what_timm_cannot_hold_is_refused(architecture: Architecture, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_timm(architecture)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("case", CASES)
def test_every_model_runs_without_this_project(case: str, form: str, tmp_path: Path) -> None:
    model, file = trained_like(CASES[case]), tmp_path / f"model.{form}"
    if form == "onnx":
        write_onnx(model, {"classes": []}, NumberType.fp32, file)
    else:
        write_pt2(model, {"classes": []}, file)
    images = CheckImages(torch.randn(5, 3, 32, 32), torch.zeros(5, dtype=torch.int64), [])
    theirs = their_answers(form, file, images, batch_size=3, threads=1)
    with torch.no_grad():
        torch.testing.assert_close(theirs.logits, model(images.pixels), rtol=1e-4, atol=2e-5)
    assert theirs.alone_differs < 1e-5
