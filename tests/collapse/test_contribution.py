"""Show what blocks contribute, on models where the answer is known."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from deepvit_train.collapse.contribution import contributions, replaceable
from deepvit_train.collapse.gradient import query_key_ratio
from tests.collapse.test_measurement import build

CLASSES = torch.tensor([0, 1, 2, 1, 0])


def images_of(size: int = 16) -> torch.Tensor:
    return torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(3))


def timm_vit(**options: object) -> nn.Module:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **(shape | options))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("attn", ["self", "reattention", "reattention_vit_pytorch", "talking_heads"])
def test_a_block_is_left_out_and_a_map_is_swapped(attn: str) -> None:
    model, images = build(attn).eval(), images_of()
    with torch.no_grad():  # maps that differ from block to block
        for block in model.blocks:
            block.attn.qkv.weight.mul_(20)
    found = contributions(model, [(images, CLASSES)])
    with torch.no_grad():
        loss = F.cross_entropy(model(images), CLASSES)
    assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-5)

    # By other means: block 1 is replaced by one that does nothing; or uses the softmax maps of block 0.
    removed = F.cross_entropy(_with_block(model, 1, nn.Identity(), images), CLASSES)
    assert float(found["removal"][1]) == pytest.approx(float(removed - loss), abs=1e-5)
    swapped = F.cross_entropy(_with_maps_of_the_block_before(model, 1, images), CLASSES)
    assert float(found["map_swap"][0]) == pytest.approx(float(swapped - loss), abs=1e-5)
    assert found["map_swap"].shape == (2,)
    assert abs(float(found["map_swap"][0])) > 1e-4

    with torch.no_grad():
        x = model.embed(images)
        block = model.blocks[0]
        branch = block.attn(block.norm1(x))
    share = (branch.norm(dim=-1) / x.norm(dim=-1)).mean()
    assert float(found["branch_share"][0]) == pytest.approx(float(share), rel=1e-5)


def _with_block(model: nn.Module, number: int, other: nn.Module, images: torch.Tensor) -> torch.Tensor:
    blocks = model.blocks
    assert isinstance(blocks, nn.Sequential)
    kept, blocks[number] = blocks[number], other
    with torch.no_grad():
        logits = model(images)
    blocks[number] = kept
    return logits


def _with_maps_of_the_block_before(model: nn.Module, number: int, images: torch.Tensor) -> torch.Tensor:
    before = None

    def attend(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal before
        attn, number_here = block.attn, block_numbers[block]
        q, k, v = attn._heads(block.norm1(x))
        maps = before if number_here == number else attn.softmax_maps(q, k)
        before = maps
        x = x + attn._output(attn.mixed(maps) @ v)
        return x + block.mlp(block.norm2(x))

    block_numbers = {block: index for index, block in enumerate(model.blocks)}
    with torch.no_grad():
        x = model.embed(images)
        for block in model.blocks:
            x = attend(block, x)
        return model.forward_head(model.norm(x))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"init_values": 0.1}, {"global_pool": "avg"}])
def test_models_of_timm_compute_what_they_compute(options: dict[str, object]) -> None:
    model, images = timm_vit(**options).eval(), images_of()
    with torch.no_grad():
        loss = F.cross_entropy(model(images), CLASSES)
    found = contributions(model, [(images, CLASSES)])
    assert float(found["loss"]) == pytest.approx(float(loss), abs=1e-6)
    assert found["branch_share"].shape == found["removal"].shape == (3,)


def test_uniform_maps_and_copied_maps_are_replaceable_and_others_are_not() -> None:
    model, images = build("self", depth=4), images_of()
    torch.manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.proj):
                layer.weight.normal_(std=0.6)
    assert replaceable(contributions(model, [(images, CLASSES)])["map_swap"], rise=0.0) < 1.0
    for block in model.blocks[1:]:
        with torch.no_grad():
            query, key, _ = block.attn.qkv.weight.chunk(3)
            query.zero_()
            key.zero_()  # uniform maps
    found = contributions(model, [(images, CLASSES)])["map_swap"]
    assert found[1:].abs().max() < 1e-6
    assert abs(float(found[0])) > 1e-4
    assert replaceable(found, rise=1e-5) >= 2 / 3


def test_a_block_with_the_maps_of_the_block_before_is_replaceable() -> None:
    model, images = build("self", depth=4), images_of()
    torch.manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=0.6)
        # Block 1 adds nothing, so that block 2 sees the same tokens; with its weights it makes the same maps.
        for layer in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
        query, key, _ = model.blocks[1].attn.qkv.weight.chunk(3)
        model.blocks[2].attn.qkv.weight[: 2 * len(query)] = torch.cat([query, key])
        model.blocks[2].norm1.load_state_dict(model.blocks[1].norm1.state_dict())
    rises = contributions(model, [(images, CLASSES)])["map_swap"]
    assert abs(float(rises[1])) < 1e-6
    assert abs(float(rises[2])) > 1e-3


def test_batches_of_any_size_give_the_same_averages_and_leave_the_model_alone() -> None:
    model, images = build("reattention").train(), images_of()
    model.blocks[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole = contributions(model, [(images, CLASSES)])
    parts = contributions(model, [(images[:2], CLASSES[:2]), (images[2:], CLASSES[2:])])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-6, rtol=1e-5)
    assert model.training
    assert not model.blocks[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_few_blocks_of_a_deep_model_are_swapped() -> None:
    model, images = build("self", depth=9), images_of()
    every = contributions(model, [(images, CLASSES)])["map_swap"]
    few = contributions(model, [(images, CLASSES)], at_most=4)
    assert few.keys() == {"branch_share", "loss", "map_swap"}
    torch.testing.assert_close(few["map_swap"], every[[1, 3, 5, 7]])  # blocks 2, 4, 6 and 8
    all_of_them = contributions(model, [(images, CLASSES)], at_most=20)["map_swap"]
    torch.testing.assert_close(all_of_them, every)


def test_images_without_classes_and_a_single_block() -> None:
    assert contributions(build("self"), [(images_of(), None)]).keys() == {"branch_share"}
    found = contributions(build("self", depth=1), [(images_of(), CLASSES)])
    assert len(found["map_swap"]) == 0
    assert replaceable(found["map_swap"], rise=0.01) == 0.0


def test_the_ratio_of_gradients() -> None:
    model, images = build("reattention"), images_of()
    assert query_key_ratio(model) is None
    F.cross_entropy(model(images), CLASSES).backward()
    ratios = query_key_ratio(model)
    assert ratios is not None
    query, key, value = model.blocks[2].attn.qkv.weight.grad.chunk(3)
    expected = (query.norm() ** 2 + key.norm() ** 2).sqrt() / value.norm()
    assert float(ratios[2]) == pytest.approx(float(expected))
    for parameter in model.blocks[0].parameters():
        parameter.grad = None
    rest = query_key_ratio(model)
    assert rest is not None
    assert len(rest) == 2
