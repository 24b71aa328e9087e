"""Measure whole models: averages over batches, and the names that figures and reports rely on."""

from __future__ import annotations

import timm
import torch

from deepvit_train.collapse import measure
from deepvit_train.collapse.measurement import as_data, grid_of, measure_model, similar, theta_of
from deepvit_train.config.collapse import Axis, CollapseConfig, Maps, Metric
from deepvit_train.models import DeepViT, record_maps

DEFINITION = CollapseConfig(
    maps=Maps.pre_mix,
    metric=Metric.raw,
    axis=Axis.column,
    threshold=0.9,
    k=1,
    images=4,
    swap_rise=0.01,
)


def build(attn: str, depth: int = 3) -> DeepViT:
    torch.manual_seed(0)
    return DeepViT(
        image_size=16,
        patch_size=4,
        num_classes=3,
        dim=24,
        depth=depth,
        heads=3,
        mlp_dim=32,
        attn=attn,
        registers=1,
    )


def test_batches_of_any_size_give_the_same_averages() -> None:
    model, images = build("self"), torch.randn(5, 3, 16, 16)
    whole = measure_model(model, [images])
    parts = measure_model(model, [images[:2], images[2:]])
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-5)


def test_measures_of_a_model_are_those_of_its_maps() -> None:
    model, images = build("reattention_vit_pytorch"), torch.randn(2, 3, 16, 16)
    found = measure_model(model, [images])
    records = list(record_maps(model, images))
    after = measure.similarity_matrix([record.after for record in records], Axis.row, Metric.raw)
    torch.testing.assert_close(found["similarity/post_norm/raw/row"], after)
    assert found["similarity/post_norm/raw/row"].shape == (3, 3)
    torch.testing.assert_close(found["entropy"][1], measure.entropy(records[1].before))
    assert found["heads/pre_mix/centred/column"].shape == (3,)
    assert found["distance"].shape == found["rank"].shape == found["deviation/post_norm"].shape == (3, 3)
    ratio = measure.ratio_of_vectors([record.before for record in records], Axis.column, Metric.centred, k=1)
    torch.testing.assert_close(found["vectors/centred/column"], ratio)
    assert theta_of(model)[2] == model.blocks[2].attn.theta.tolist()
    assert theta_of(build("self")) == [None, None, None]


def test_a_model_whose_blocks_are_copies_is_all_similar() -> None:
    # Blocks that add nothing leave the tokens as they are, so that equal weights make equal maps.
    model = build("self", depth=4)
    with torch.no_grad():
        for block in model.blocks:
            block.load_state_dict(model.blocks[0].state_dict())
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    found = measure_model(model, [torch.randn(2, 3, 16, 16)])
    for metric in Metric:
        matrix = found[f"similarity/pre_mix/{metric}/column"]
        torch.testing.assert_close(matrix, torch.ones(4, 4, dtype=torch.float64), atol=1e-5, rtol=0)
    assert similar(found, DEFINITION).tolist() == [False, True, True, True]
    data = as_data(found, DEFINITION)
    counted = data["similar_blocks"]["pre_mix/raw/column"]
    assert (counted["count"], counted["ratio"], counted["blocks"]) == (3, 1.0, [1, 2, 3])
    assert data["averages"]["tokens"] == found["tokens"].tolist()


def test_the_grid_of_patches() -> None:
    model = build("self")
    assert grid_of(model, next(record_maps(model, torch.randn(1, 3, 16, 16)))) == (4, 4)
    wide = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1, num_classes=2)
    assert grid_of(wide, next(record_maps(wide, torch.randn(1, 3, 32, 64)))) == (2, 4)
