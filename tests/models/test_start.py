"""Start a model that differs from its file: weights are resampled, and head or Theta stay fresh."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from deepvit_train.config.model import ThetaInit, ThetaNorm
from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.config.shipped import choices
from deepvit_train.error import CheckpointError
from deepvit_train.models import DeepViT, start_from
from tests.models.reference import authors_logits, authors_state

SHAPE = {"image_size": 16, "patch_size": 4, "num_classes": 5}
SHAPE |= {"dim": 24, "depth": 3, "heads": 3, "mlp_dim": 72, "dim_head": 8}
PAPER = {"attn": "reattention", "stem": "conv", "init": "vit", "qkv_bias": True, "norm_eps": 1e-6}


def saved(folder: Path, content: object) -> str:
    torch.save(content, folder / "weights.pth")
    return str(folder / "weights.pth")


def images_of(size: int = 16) -> torch.Tensor:
    return torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_same_shape_has_the_same_logits_and_another_head_is_fresh(tmp_path: Path) -> None:
    state = authors_state()
    path = saved(tmp_path, {"state_dict": state})
    model = DeepViT(**SHAPE, **PAPER).double()
    start = start_from(model, path)
    assert str(start) == f"initial weights: {path} (the authors' layout)"
    torch.testing.assert_close(model.eval()(images_of()), authors_logits(state, images_of(), heads=3))

    torch.manual_seed(3)
    other = DeepViT(**{**SHAPE, "num_classes": 7}, **PAPER).double()
    fresh = other.head.weight.clone()
    assert start_from(other, path).notes == ["fresh head of 7 classes, not 5"]
    assert torch.equal(other.head.weight, fresh)
    torch.testing.assert_close(
        other.eval().forward_features(images_of()), model.forward_features(images_of())
    )


def test_positions_and_patches_are_resampled_for_another_size(tmp_path: Path) -> None:
    state = authors_state()
    path = saved(tmp_path, state)
    model = DeepViT(**{**SHAPE, "image_size": 28}, **PAPER).double()
    assert start_from(model, path).notes == ["positions resampled from 4x4 to 7x7"]
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    grid = state["pos_embed"][:, 1:].float().mT.unflatten(-1, (4, 4))
    bicubic = F.interpolate(grid, (7, 7), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, 1:], bicubic.double(), rtol=1e-5, atol=1e-6)

    # Patches of 8 pixels on 32 see what patches of 4 see on 16, where a pixel is doubled (FlexiViT).
    finer = DeepViT(**{**SHAPE, "image_size": 32, "patch_size": 8}, **PAPER).double()
    assert start_from(finer, path).notes == ["patch kernels resampled from 4x4 to 8x8"]
    doubled = F.interpolate(images_of(), scale_factor=2, mode="bilinear")
    similarity = F.cosine_similarity(
        finer.patch_embed(doubled).flatten(), model.patch_embed(images_of()).flatten(), dim=0
    )
    assert similarity > 0.95


def test_224_to_384_keeps_a_smooth_field_of_positions(tmp_path: Path) -> None:
    small = replace(model_preset("deepvit_l").model, depth=21, dim=24, heads=2)
    attn = model_preset("deepvit_l").attn
    source = DeepViT(Architecture(small, attn), num_classes=3)
    rows = torch.linspace(-1, 1, 14).view(14, 1).expand(14, 14)
    with torch.no_grad():
        source.pos_embed[0, 1:, 0] = rows.flatten()
    large = DeepViT(Architecture(replace(small, image_size=384), attn), num_classes=3)
    notes = start_from(large, saved(tmp_path, source.state_dict())).notes
    assert notes == ["positions resampled from 14x14 to 24x24"]
    field = large.pos_embed[0, 1:, 0].detach().view(24, 24)
    assert torch.allclose(field, field[:, :1].expand(24, 24), atol=1e-5)
    assert (field[1:, 0] > field[:-1, 0]).all()
    assert field.abs().max() < 1.1
    assert large(torch.randn(1, 3, 384, 384)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", [name for name in choices("attn") if name not in ("self", "differential")])
def test_a_plain_pretrained_vit_becomes_a_deepvit_with_its_logits(
    tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    plain = timm.create_model("vit_tiny_patch16_224", mlp_ratio=3.0, **shape).to(dtype).eval()
    path = saved(tmp_path, plain.state_dict())
    attn = replace(attention_preset(form), norm=ThetaNorm.none, theta_init=ThetaInit.identity)
    model = DeepViT(**SHAPE, **{**PAPER, "attn": attn}).to(dtype).eval()
    (note,) = start_from(model, path).notes
    added = [name for name in model.blocks[0].attn.state_dict() if not name.startswith(("qkv", "proj"))]
    assert "theta" in added
    assert note.removeprefix("fresh in 3 blocks: attn.").split(", attn.") == added
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(model(images_of().to(dtype)), plain(images_of().to(dtype)), **tolerance)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 36, "heads": 3, "dim_head": 12}, r"has width 24, not model\.dim=36; nearest: model\.dim=24"),
        ({"depth": 4}, r"missing: blocks\.3\.norm1\.weight"),
        ({"depth": 2}, r"not read: blocks\.2\."),
        ({"attn": "self"}, r"not read: blocks\.0\.attn\.theta"),
        (
            {"attn": replace(attention_preset("reattention"), from_block=2)},
            r"not read: blocks\.0\.attn\.theta",
        ),
        ({"attn": "talking_heads"}, r"missing: blocks\.0\.attn\.logit_theta"),
        ({"layer_scale": 0.1}, r"missing: blocks\.0\.ls1\.gamma"),
        ({"registers": 1}, "missing: reg_token"),
    ],
)
def test_a_file_of_another_architecture_changes_nothing(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = saved(tmp_path, authors_state())
    model = DeepViT(**{**SHAPE, **PAPER, **changes})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        start_from(model, path)
    assert str(error.value).startswith(f"model.weights={path}: ")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "preset", "near"),
    [
        ("vit_tiny_patch16_224", "vit_small", "vit_tiny"),
        ("vit_tiny_patch16_224", "deit_base", "deit_tiny"),
        ("vit_base_patch16_224", "vit_small", "vit_base"),
    ],
)
def test_the_preset_of_a_files_width_is_named(tmp_path: Path, name: str, preset: str, near: str) -> None:
    path = saved(tmp_path, timm.create_model(name, num_classes=3).state_dict())
    architecture = model_preset(preset)
    with pytest.raises(CheckpointError, match=rf"not model\.dim=\d+; nearest: model={near}$"):
        start_from(DeepViT(architecture, num_classes=3), path)
    model = DeepViT(model_preset(near), num_classes=3)
    assert start_from(model, path).notes == []


def test_a_file_without_a_head_is_said_to_have_none(tmp_path: Path) -> None:
    state = {name: value for name, value in authors_state().items() if not name.startswith("head.")}
    path = saved(tmp_path, state)
    notes = start_from(DeepViT(**SHAPE, **PAPER).double(), path).notes
    assert notes == ["fresh head of 5 classes, because the file has no head"]


def test_theta_in_fewer_blocks_than_the_model_mixes_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, authors_state(from_block=1))
    with pytest.raises(CheckpointError, match=r"does not mix heads in the blocks that attn\.from_block says"):
        start_from(DeepViT(**SHAPE, **PAPER), path)


def test_the_norm_after_timms_mean_is_taken_by_the_same_head_alone(tmp_path: Path) -> None:
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    theirs = timm.create_model("vit_tiny_patch16_224", **size, mlp_ratio=3, global_pool="avg").eval()
    path = saved(tmp_path, theirs.state_dict())
    plain = {**SHAPE, **PAPER, "attn": "self"}
    with pytest.raises(CheckpointError, match=r"not model\.pool=cls; nearest: model\.pool=mean_patches"):
        start_from(DeepViT(**plain), path)
    model = DeepViT(**plain, pool="mean_patches").eval()
    start_from(model, path)
    torch.testing.assert_close(model(images_of().float()), theirs(images_of().float()))
