"""Compare recorded maps with hooks on a naive forward pass, and with timm's own unfused attention."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from deepvit_train.config.shipped import choices
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT, record_maps
from deepvit_train.models.walk import walk_through

SHAPE = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 3,
    "dim": 24,
    "depth": 4,
    "heads": 3,
    "mlp_dim": 32,
}


@pytest.mark.parametrize("attn", choices("attn"))
def test_maps_are_those_the_model_multiplies_by(attn: str) -> None:
    torch.manual_seed(0)
    model = DeepViT(**SHAPE, attn=attn, registers=2).eval()
    images = torch.randn(2, 3, 16, 16)
    records = list(record_maps(model, images))
    assert [record.block for record in records] == [0, 1, 2, 3]
    x = model.embed(images)
    for record, block in zip(records, model.blocks, strict=True):
        assert record.before.shape == record.after.shape == (2, 3, 19, 19)
        torch.testing.assert_close(record.before.sum(-1), torch.ones(2, 3, 19))
        assert record.mixes == (attn != "self")
        assert torch.equal(record.before, record.after) == (attn == "self")
        _, _, v = block.attn._heads(block.norm1(x))
        branch = block.attn._output(record.after @ v)
        torch.testing.assert_close(branch, block.attn(block.norm1(x)), rtol=1e-4, atol=1e-5)
        x = block(x)
        torch.testing.assert_close(record.features, x, rtol=1e-4, atol=1e-5)
        assert record.prefix == 3


def test_recording_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = DeepViT(**SHAPE, attn="reattention", dropout=0.5).train()
    model.blocks[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for record in record_maps(model, torch.randn(2, 3, 16, 16)):
        assert torch.is_grad_enabled()
        assert not record.after.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.blocks[0].training
    assert not model.blocks[1].training
    stopped = record_maps(model, torch.randn(2, 3, 16, 16))
    next(stopped)
    stopped.close()
    assert model.training


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2, "qk_norm": True, "init_values": 0.1}])
def test_maps_of_timms_vision_transformer(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=5, **options
    ).eval()
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, maps: seen.append(maps))
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    expected = list(seen)
    records = list(record_maps(model, images))
    assert len(records) == 3
    for record, maps in zip(records, expected, strict=True):
        torch.testing.assert_close(record.before, maps)
        assert not record.mixes
    torch.testing.assert_close(model.norm(records[-1].features), features)


EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_dinov3",
        "vit_small_plus_patch16_dinov3_qkvb",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_rope_mixed_ape_224",
        "vit_pe_core_tiny_patch16_384",
    ],
)
def test_maps_of_timms_eva(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **EVA).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, maps: seen.append(maps))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits, expected = model(images), list(seen)
        records = list(record_maps(model, images))
        for record, maps in zip(records, expected, strict=True):
            torch.testing.assert_close(record.before, maps, rtol=1e-4, atol=1e-6)
        walk = walk_through(model)
        torch.testing.assert_close(walk.classify(records[-1].features), logits, rtol=1e-4, atol=1e-5)
        first = walk.through(0, walk.embed(images))
        torch.testing.assert_close(walk.finish(1, first.features), logits, rtol=1e-4, atol=1e-5)
    assert records[0].prefix == model.num_prefix_tokens


def test_what_can_not_be_recorded_is_named() -> None:
    with pytest.raises(ConfigError, match="Linear"):
        record_maps(nn.Linear(2, 2), torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"DINOv3"):
        record_maps(timm.create_model("resnet18"), torch.zeros(1, 3, 16, 16))
    diff = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, attn_layer="diff")
    with pytest.raises(ConfigError, match=r"blocks\.0: DiffAttention"):
        record_maps(diff, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("attn", choices("attn"))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_maps_with_gradients_change_neither_logits_nor_gradients(attn: str, checkpointing: bool) -> None:
    gradients = []
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for map_blocks in (0, 2, 9):
        torch.manual_seed(0)
        model = DeepViT(**SHAPE, attn=attn).double().train()
        model.set_grad_checkpointing(checkpointing)
        out = model(images.double(), map_blocks=map_blocks)
        logits, maps = out if map_blocks else (out, [])
        assert len(maps) == min(map_blocks, 4)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    for other in gradients[1:]:
        for left, right in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
