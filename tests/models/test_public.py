"""Public layouts of vision transformers: each gives timm's logits, and what is not read is refused or listed.

The layouts are made here from timm models with random weights. Their names are those of:
- MAE, DINO, DINOv2, I-JEPA: the files of facebookresearch/{mae, dino, dinov2, ijepa};
- DeiT and DeiT III: facebookresearch/deit;
- CLIP: openai/CLIP and mlfoundations/open_clip, also with timm's vision tower;
- TIPSv2 and RADIO: as timm's checkpoint_filter_fn reads them;
- Google's: google-research/vision_transformer and big_vision.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.models import DeepViT, load_model, start_from
from deepvit_train.models.importer import import_model
from deepvit_train.run.found import find

SHAPE: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}
OWN: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 5,
    "dim": 24,
    "depth": 2,
    "heads": 4,
    "mlp_dim": 96,
    "dim_head": 6,
    "attn": "self",
    "stem": "conv",
    "qkv_bias": True,
}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
State = dict[str, Any]


def built(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    """A small timm model whose every parameter is random."""
    torch.manual_seed(0)
    model = timm.create_model(name, **SHAPE | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def same(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), theirs(IMAGES), rtol=1e-5, atol=1e-5)


def imported(file: Path, preset: str | None = None, weights: str = "auto", **said: Any) -> Any:
    return import_model(find(str(file), weights), preset, weights, said)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"qk_norm": True}, {}),
        ({"qk_norm": True, "init_values": 0.1, "reg_tokens": 2}, {}),
        ({"class_token": False, "global_pool": "avg"}, {"act": "gelu"}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"act": "gelu"}),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 4}, {"act": "gelu"}),
        (
            {"class_token": False, "global_pool": "avg", "reg_tokens": 4, "no_embed_class": True},
            {"act": "gelu"},
        ),
        ({"class_token": False, "global_pool": "avg", "act_layer": "gelu_tanh"}, {"act": "gelu_tanh"}),
        ({"pre_norm": True, "norm_layer": "layernorm"}, {"act": "gelu", "norm_eps": 1e-6}),
        ({"pre_norm": True, "act_layer": "quick_gelu"}, {"act": "quick_gelu", "norm_eps": 1e-6}),
    ],
    ids=lambda value: " ".join(value),
)
def test_pieces_of_timms_models(tmp_path: Path, options: State, said: State) -> None:
    theirs = built(**options)
    same(load_model(saved(tmp_path, theirs.state_dict()), heads=4, **said), theirs)


def to_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names of a vision tower."""
    names = (
        (r"patch_embed\.proj", "conv1"),
        (r"blocks\.", "transformer.resblocks."),
        (r"norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"norm([12])\.", r"ln_\1."),
        (r"qkv\.", "in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for old, new in names:
            name = re.sub(old, new, name)
        found[f"visual.{name}"] = value
    found["visual.class_embedding"] = found.pop("visual.cls_token").flatten()
    found["visual.positional_embedding"] = found.pop("visual.pos_embed")[0]
    found["visual.proj"] = found.pop("visual.head.weight").T.contiguous()
    assert not found.pop("visual.head.bias").any()
    text = {"logit_scale": torch.zeros(()), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    return found | text | {"positional_embedding": torch.zeros(7, 8), "text_projection": torch.zeros(8, 5)}


def no_bias(model: VisionTransformer) -> VisionTransformer:
    with torch.no_grad():
        model.head.bias.zero_()
    return model


@pytest.mark.parametrize("prefix", ["", "module."])
def test_clip_of_openai_and_of_open_clip(tmp_path: Path, prefix: str) -> None:
    theirs = no_bias(built("vit_base_patch16_clip_quickgelu_224"))
    file = saved(tmp_path, {prefix + name: value for name, value in to_clip(theirs.state_dict()).items()})
    with pytest.raises(CheckpointError, match="give preset=timm:NAME, or act=gelu"):
        load_model(file, heads=4)
    found = imported(file, heads=4, act="quick_gelu")
    same(found.model, theirs)
    assert found.left_out == [
        "logit_scale",
        "transformer.resblocks.0.ln_1.weight",
        "positional_embedding",
        "text_projection",
    ]
    wrong = load_model(file, heads=4, act="gelu")
    assert (wrong(IMAGES) - theirs(IMAGES)).abs().max() > 1e-3  # so it is right to ask
    named = imported(file, "timm:vit_base_patch16_clip_quickgelu_224", heads=4)
    same(named.model, theirs)
    assert named.description.architecture.model.mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])


def test_open_clip_with_a_tower_of_timm(tmp_path: Path) -> None:
    theirs = no_bias(built())
    state = {f"visual.trunk.{name}": value for name, value in theirs.state_dict().items()}
    state["visual.head.proj.weight"] = state.pop("visual.trunk.head.weight")
    del state["visual.trunk.head.bias"]
    found = imported(saved(tmp_path, state | {"text.token_embedding.weight": torch.ones(2, 2)}), heads=4)
    same(found.model, theirs)
    assert found.left_out == ["text.token_embedding.weight"]
    with pytest.raises(CheckpointError, match=r"not read: visual\.head\.mlp\.weight"):
        load_model(saved(tmp_path, state | {"visual.head.mlp.weight": torch.ones(2)}), heads=4)


def decoder() -> dict[str, Tensor]:
    """What MAE's pre-training adds."""
    parts = (
        "decoder_embed.weight",
        "decoder_blocks.0.norm1.weight",
        "decoder_norm.bias",
        "decoder_pred.bias",
    )
    return {name: torch.ones(3) for name in ("mask_token", "decoder_pos_embed", *parts)}


def test_mae_with_its_decoder(tmp_path: Path) -> None:
    theirs = built(num_classes=0)
    found = imported(saved(tmp_path, {"model": theirs.state_dict() | decoder()}), heads=4)
    same(found.model, theirs)
    assert sorted(found.left_out) == sorted(decoder())


def test_dino_takes_the_teacher_and_its_student_on_demand(tmp_path: Path) -> None:
    teacher, student = built(num_classes=0), built(num_classes=0, init_values=None, depth=3)
    head = {"head.mlp.0.weight": torch.ones(3), "head.last_layer.weight_g": torch.ones(3)}
    content = {
        "student": {f"module.backbone.{name}": value for name, value in student.state_dict().items()}
        | {f"module.{name}": value for name, value in head.items()},
        "teacher": {f"backbone.{name}": value for name, value in teacher.state_dict().items()} | head,
        "epoch": 100,
    }
    found = imported(saved(tmp_path, content), heads=4)
    same(found.model, teacher)
    assert (found.weights, found.left_out) == ("ema", list(head))
    same(imported(saved(tmp_path, content), weights="live", heads=4).model, student)

    flat = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in content[who].items()}
    for weights, model in (("auto", teacher), ("ema", teacher), ("live", student)):
        found = imported(saved(tmp_path, {"state_dict": flat}), weights=weights, heads=4)
        same(found.model, model)
    assert sum(name.startswith("teacher.") for name in found.left_out) == len(content["teacher"])
    with pytest.raises(CheckpointError, match="holds no live weights"):
        imported(saved(tmp_path, {"teacher": content["teacher"]}), weights="live", heads=4)


@pytest.mark.parametrize("prefix", ["net.", "model.", "module.model.", "model.net._orig_mod."])
def test_lightnings_prefixes(tmp_path: Path, prefix: str) -> None:
    theirs = built()
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    same(
        load_model(saved(tmp_path, {"state_dict": state, "hyper_parameters": {"lr": 1e-3}}), heads=4), theirs
    )
    with pytest.raises(CheckpointError, match=r"not read: criterion\.center"):
        load_model(saved(tmp_path, state | {"criterion.center": torch.ones(1)}), heads=4)
    with pytest.raises(CheckpointError, match="holds several networks, under the names: "):
        load_model(saved(tmp_path, {**state, **{f"net.model.{n}": v for n, v in state.items()}}), heads=4)


def test_i_jepa_holds_an_encoder_and_its_average(tmp_path: Path) -> None:
    first, average = built(num_classes=0), built(num_classes=0, depth=3)
    content = {
        key: {f"module.{name}": value for name, value in model.state_dict().items()}
        for key, model in (("encoder", first), ("target_encoder", average))
    }
    content["predictor"] = {"module.predictor_embed.weight": torch.ones(3)}
    same(load_model(saved(tmp_path, content), heads=4), average)
    same(load_model(saved(tmp_path, content), weights="live", heads=4), first)


def test_dinov2_with_and_without_registers(tmp_path: Path) -> None:
    theirs = built(num_classes=0, init_values=0.1)
    mask = {"mask_token": torch.zeros(1, 24)}
    found = imported(saved(tmp_path, theirs.state_dict() | mask), heads=4)
    same(found.model, theirs)
    assert found.left_out == ["mask_token"]

    theirs = built(num_classes=0, init_values=0.1, reg_tokens=4, no_embed_class=True)
    state = theirs.state_dict() | mask
    state["register_tokens"] = state.pop("reg_token")
    own = torch.randn(1, 1, 24)  # their class token has a position, which timm adds to it
    state["pos_embed"] = torch.cat([own, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - own
    same(load_model(saved(tmp_path, state), heads=4), theirs)
    tips = {f"vision_encoder.{name}": value for name, value in state.items()}
    found = imported(
        saved(tmp_path, tips | {"text_encoder.a": torch.ones(1), "temperature": mask["mask_token"]}), heads=4
    )
    same(found.model, theirs)
    assert found.left_out == ["vision_encoder.mask_token", "text_encoder.a", "temperature"]


def test_deit_iii_and_old_timm(tmp_path: Path) -> None:
    theirs = built(init_values=0.1, no_embed_class=True)
    state = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): v for name, v in theirs.state_dict().items()}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    file = saved(tmp_path, state | {"pre_logits.fc.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="rotary positions have the same names; give preset=timm:NAME"):
        load_model(file, heads=4)
    found = imported(file, "timm:deit3_small_patch16_224", heads=4)
    same(found.model, theirs)
    assert found.left_out == ["pre_logits.fc.weight"]


@pytest.mark.parametrize(
    ("names", "both"),
    [
        (["blocks.0.gamma_1"], "blocks.0.ls1.gamma"),
        (["mask_token", "register_tokens", "reg_token"], "reg_token"),
        (["visual.class_embedding"], "cls_token"),
    ],
)
def test_no_tensor_is_lost_because_two_names_become_one(tmp_path: Path, names: list[str], both: str) -> None:
    state = built(init_values=0.1).state_dict() | {name: torch.ones(1, 1, 24) for name in names}
    with pytest.raises(CheckpointError, match=f"holds under two names: {both}"):
        load_model(saved(tmp_path, state), heads=4)


def test_a_distilled_deit_answers_with_its_class_head(tmp_path: Path) -> None:
    theirs = built("deit_tiny_distilled_patch16_224")
    found = imported(saved(tmp_path, {"model": theirs.state_dict()}), heads=4)
    assert found.left_out == ["head_dist.weight", "head_dist.bias"]
    with torch.no_grad():
        class_head = theirs.head(theirs.forward_features(IMAGES)[:, 0])
        torch.testing.assert_close(found.model(IMAGES), class_head, rtol=1e-5, atol=1e-5)


def test_radio_by_the_name_of_timms_model(tmp_path: Path) -> None:
    theirs = built("vit_base_patch16_radio_v3", num_classes=0, reg_tokens=3)
    names = theirs.state_dict()
    state = {
        f"radio_model.model.{name}": value for name, value in names.items() if name.startswith("blocks.")
    }
    kernel, parts = names["patch_embed.proj.weight"], "radio_model.model.patch_generator"
    with torch.no_grad():
        theirs.patch_embed.proj.bias.zero_()
    state[f"{parts}.embedder.weight"] = kernel.flatten(1)
    state[f"{parts}.pos_embed"] = names["pos_embed"]
    state[f"{parts}.cls_token.token"] = torch.cat([names["cls_token"], names["reg_token"]], dim=1)[0]
    state["radio_model.input_conditioner.norm_mean"] = torch.zeros(3)
    file = saved(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight"):
        load_model(file, heads=4)
    found = imported(file, "timm:vit_base_patch16_radio_v3", heads=4)
    same(found.model, theirs)
    assert found.left_out == ["radio_model.input_conditioner.norm_mean"]


def to_google(model: VisionTransformer, big_vision: bool, stacked: bool = False) -> dict[str, Any]:
    """Google's names and shapes of a model."""
    attention, mlp, second = ("0", "0", "1") if big_vision else ("1", "3", "2")
    where = {"norm1": "LayerNorm_0", "norm2": f"LayerNorm_{second}"}
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        kernel = "kernel" if value.ndim > 1 else "bias"
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            index, part, what = match.groups()
            place = f"Transformer/encoderblock_{index}/"
            if part in where:
                found[f"{place}{where[part]}/{'scale' if what == 'weight' else 'bias'}"] = value
            elif part.startswith("mlp"):
                dense = f"{place}MlpBlock_{mlp}/Dense_{int(part[-1]) - 1}/{kernel}"
                found[dense] = value.T if value.ndim > 1 else value
            elif part == "attn.proj":
                out = value.T.unflatten(0, (4, 6)) if value.ndim > 1 else value
                found[f"{place}MultiHeadDotProductAttention_{attention}/out/{kernel}"] = out
            else:
                for which, each in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    shaped = each.T.unflatten(1, (4, 6)) if each.ndim > 1 else each.unflatten(0, (4, 6))
                    found[f"{place}MultiHeadDotProductAttention_{attention}/{which}/{kernel}"] = shaped
        elif name.startswith("patch_embed"):
            found[f"embedding/{kernel}"] = value.permute(2, 3, 1, 0) if value.ndim > 1 else value
        elif name == "pos_embed":
            found["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"] = value
        elif name == "cls_token":
            found["cls"] = value
        elif name.startswith(("norm", "fc_norm")):
            found[f"Transformer/encoder_norm/{'scale' if name.endswith('weight') else 'bias'}"] = value
        else:
            found[f"head/{kernel}"] = value.T if value.ndim > 1 else value
    if stacked:
        blocks = {name: value for name, value in found.items() if "encoderblock_0/" in name}
        single = {name: value for name, value in found.items() if "encoderblock_" not in name}
        found = single | {
            name.replace("_0/", "/", 1): torch.stack([value, found[name.replace("block_0", "block_1")]])
            for name, value in blocks.items()
        }
    prefix = "params/" if big_vision else ""
    return {prefix + name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize(("big_vision", "stacked"), [(False, False), (True, False), (True, True)])
def test_googles_npz(tmp_path: Path, big_vision: bool, stacked: bool) -> None:
    theirs = built()
    file = tmp_path / "augreg.npz"
    np.savez(file, **to_google(theirs, big_vision, stacked))  # pyright: ignore
    again = built(depth=2)
    again.load_pretrained(str(file))  # timm reads the file that was made here as it was meant
    same(again, theirs)
    same(load_model(file), theirs)  # its arrays show the heads
    with pytest.raises(CheckpointError, match="heads=3, but the file has 4 heads"):
        load_model(file, heads=3)
    arrays = to_google(theirs, big_vision, stacked)
    arrays["pre_logits/kernel"] = np.zeros((24, 24), np.float32)
    np.savez_compressed(file, **arrays)  # pyright: ignore
    found = imported(file)
    same(found.model, theirs)
    assert found.left_out == ["pre_logits/kernel"]
    np.savez(file, **arrays, extra=np.zeros(3, np.float32))  # pyright: ignore
    with pytest.raises(CheckpointError, match="not read: extra"):
        load_model(file)


def test_initial_weights_tell_what_was_left_out(tmp_path: Path) -> None:
    theirs = built(num_classes=0)
    model = DeepViT(**OWN, norm_eps=1e-6)
    start = start_from(model, str(saved(tmp_path, {"model": theirs.state_dict() | decoder()})))
    assert start.notes[0] == (
        "left out, 6 tensors of: mask_token, decoder_pos_embed, decoder_embed, decoder_blocks, decoder_norm, "
        "decoder_pred"
    )
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(IMAGES), theirs.forward_features(IMAGES), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("vit_base_patch16_rpn_224", "its blocks are ResPostBlock"),
        ("vit_base_patch16_siglip_224", "attention pool"),
        ("vit_giant_patch14_dinov2", "its MLP is a GluMlp"),
        ("aimv2_large_patch14_224", "its stem ends in a norm"),
        ("vit_base_r50_s16_224", "its stem is a HybridEmbed"),
        ("beit3_base_patch16_224", "a norm or a gate after the values"),
        ("resnet18", "it is a ResNet, not a VisionTransformer"),
        ("vit_dwee_patch16_reg1_gap_256", "its attention is DiffAttention"),
        ("vit_smal_patch16_224", "timm has no such model; did you mean"),
    ],
)
def test_a_model_that_cannot_be_built_here_is_refused_with_the_reason(
    tmp_path: Path, name: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=f"timm:{name}: .*{why}"):
        load_model(saved(tmp_path, built().state_dict()), preset=f"timm:{name}")


def test_norms_after_a_branch_look_like_norms_before_it(tmp_path: Path) -> None:
    options = {"class_token": False, "global_pool": "avg", "qkv_bias": False}
    with pytest.raises(CheckpointError, match="norms before and after a branch"):
        load_model(saved(tmp_path, built(**options).state_dict()), heads=4, act="gelu")


def test_the_place_of_the_last_norm_is_that_of_the_named_model(tmp_path: Path) -> None:
    file = saved(tmp_path, built(class_token=False, global_pool="avg").state_dict())
    with pytest.raises(CheckpointError, match="comes after the pooling, unlike the preset's"):
        load_model(file, preset="timm:vit_base_patch16_siglip_gap_224", heads=4)


def test_timms_function_still_reads_what_is_passed_to_it() -> None:
    """A canary: the function of timm that this package calls has these parameters."""
    import inspect

    names = list(inspect.signature(checkpoint_filter_fn).parameters)
    assert names[:3] == ["state_dict", "model", "adapt_layer_scale"]


def test_a_model_without_a_class_token_keeps_to_it() -> None:
    with pytest.raises(ConfigError, match=r"model\.class_token=false.*nearest: model\.pool=mean_patches"):
        DeepViT(**OWN, class_token=False)
    model = DeepViT(**OWN, class_token=False, pool="mean", registers=2).eval()
    assert model.forward_features(IMAGES).shape == (3, 18, 24)
    pooled = model.forward_features(IMAGES)[:, 2:].mean(dim=1)
    torch.testing.assert_close(model(IMAGES), model.head(model.norm(pooled)))
    with pytest.raises(ConfigError, match="no class token; nearest: avg"):
        model.reset_classifier(3, "token")
    model.set_input_size(24)
    assert model.pos_embed.shape == (1, 36, 24)
    assert model(torch.zeros(2, 3, 24, 24)).shape == (2, 5)
