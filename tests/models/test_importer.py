"""Load weights of other projects: logits are those they had there, and unusable files are explained."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from vit_pytorch.deepvit import DeepViT as VitPytorchDeepViT

from deepvit_train.config.model import ThetaNorm
from deepvit_train.config.shipped import choices
from deepvit_train.error import CheckpointError, ConfigError
from deepvit_train.models import DeepViT, load_model
from tests.models.reference import authors_logits, authors_state

VIT_PYTORCH_SHAPE = {
    "image_size": 16,
    "patch_size": 4,
    "num_classes": 5,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "mlp_dim": 40,
}
IMAGES = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, content: object) -> Path:
    file = folder / "weights.pth.tar"
    torch.save(content, file)
    return file


def float_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


@pytest.mark.parametrize("wrapped", ["bare", "state_dict", "module", "legacy"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({}, {}),
        ({"from_block": 1, "hidden": 49, "image_size": 24}, {"residual_scale": 0.7}),
        ({"cnn": True, "from_block": 2}, {"residual_scale": 0.5, "transform_scale": True}),
        ({"cnn": True, "patch_size": 8}, {"residual_scale": 0.5, "transform_scale": False}),
        ({"from_block": 9}, {"heads": 3}),
    ],
)
def test_the_authors_layout_gives_the_logits_of_the_formula(
    tmp_path: Path, shape: dict[str, int], options: dict[str, object], wrapped: str
) -> None:
    state = authors_state(**shape)
    size = shape.get("image_size", 16)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = authors_logits(state, images, **{"heads": 3, **options})
    if wrapped == "state_dict":
        file = saved(tmp_path, {"epoch": 299, "args": argparse.Namespace(lr=1.0), "state_dict": state})
    elif wrapped == "module":
        file = saved(tmp_path, {"state_dict": {f"module.{name}": value for name, value in state.items()}})
    else:
        file = tmp_path / "weights.pth"
        torch.save(state, file, _use_new_zipfile_serialization=wrapped == "bare")
    model = load_model(file, **options)
    assert not model.training
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_a_preset_gives_what_no_tensor_shows_and_no_size(tmp_path: Path) -> None:
    state = authors_state(cnn=True, from_block=1)
    file = saved(tmp_path, {"state_dict": state})
    with pytest.raises(CheckpointError, match="give preset=deepvit_s"):
        load_model(file)
    with pytest.raises(CheckpointError, match="residual_scale="):
        load_model(file, transform_scale=True)
    small, large = (load_model(file, preset=name)(IMAGES) for name in ("deepvit_s", "deepvit_l"))
    options = {"heads": 3, "residual_scale": 0.5}
    torch.testing.assert_close(small, authors_logits(state, IMAGES, transform_scale=True, **options))
    torch.testing.assert_close(large, authors_logits(state, IMAGES, transform_scale=False, **options))
    told = load_model(file, preset="deepvit_s", transform_scale=False)(IMAGES)
    torch.testing.assert_close(told, large)


def test_averaged_weights_are_taken_unless_told_otherwise(tmp_path: Path) -> None:
    live, ema = authors_state(seed=1), authors_state(seed=2)
    file = saved(tmp_path, {"state_dict": live, "state_dict_ema": ema})
    for weights, state in (("auto", ema), ("ema", ema), ("live", live)):
        logits = load_model(file, weights=weights)(IMAGES)
        torch.testing.assert_close(logits, authors_logits(state, IMAGES, heads=3))
    with pytest.raises(CheckpointError, match="holds no ema weights"):
        load_model(saved(tmp_path, {"state_dict": live}), weights="ema")


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("age", ["today", "wrapped", "linear stem"])
def test_vit_pytorch_of_today_and_before(tmp_path: Path, pool: str, age: str) -> None:
    torch.manual_seed(0)
    theirs = VitPytorchDeepViT(**VIT_PYTORCH_SHAPE, pool=pool, dim_head=10)
    state = theirs.state_dict()
    if age != "today":
        state = {_name_of_before(name): value for name, value in state.items()}
    if age == "linear stem":
        theirs.to_patch_embedding[1] = theirs.to_patch_embedding[3] = torch.nn.Identity()
        state = {name: value for name, value in state.items() if "to_patch_embedding" not in name}
        state |= {f"to_patch_embedding.1.{what}": value for what, value in
                  theirs.to_patch_embedding[2].state_dict().items()}  # fmt: skip
    file = tmp_path / "weights.safetensors"
    save_file(state, file)
    model = load_model(file, pool=pool)
    torch.testing.assert_close(model(IMAGES.float()), theirs.eval()(IMAGES.float()), rtol=1e-5, atol=1e-5)
    assert next(model.parameters()).dtype == torch.float32


def _name_of_before(name: str) -> str:
    """vit-pytorch's name of a tensor when blocks were wrapped in Residual(PreNorm(...))."""
    for new, old in (
        (".0.norm.", ".0.fn.norm."),
        (".0.to_", ".0.fn.fn.to_"),
        (".0.reattn", ".0.fn.fn.reattn"),
        (".1.net.0.", ".1.fn.norm."),
        (".1.net.1.", ".1.fn.fn.net.0."),
        (".1.net.4.", ".1.fn.fn.net.3."),
    ):
        if name.startswith("transformer") and new in name:
            return name.replace(new, old)
    return name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.1, "qkv_bias": False},
        {"reg_tokens": 4, "no_embed_class": True},
        {"reg_tokens": 2},
        {"no_embed_class": True, "num_classes": 0},
    ],
)
def test_timms_vision_transformer(tmp_path: Path, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    theirs = timm.create_model("vit_tiny_patch16_224", **{**shape, **options}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    file = saved(tmp_path, {"model": theirs.state_dict()})
    with pytest.raises(CheckpointError, match="give heads="):
        load_model(file)
    model = load_model(file, heads=4)
    torch.testing.assert_close(model(IMAGES.float()), theirs(IMAGES.float()), rtol=1e-5, atol=1e-5)


TIMM_SHAPE = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}


@pytest.mark.parametrize("others", [{}, {"reg_tokens": 2}, {"num_classes": 0}, {"no_embed_class": True}])
@pytest.mark.parametrize(
    ("pooling", "said"),
    [
        ({"global_pool": "avg"}, {}),  # fc_norm shows the mean
        ({"global_pool": "avg"}, {"pool": "mean"}),
        ({"global_pool": "avg"}, {"pool": "mean_patches"}),
        ({"global_pool": "avg", "fc_norm": False}, {"pool": "mean"}),
        ({"global_pool": "avg", "fc_norm": False}, {"pool": "mean_normed_patches"}),
        ({"global_pool": "token", "fc_norm": True}, {"pool": "cls"}),
        ({"global_pool": "token"}, {}),
    ],
)
def test_timms_mean_leaves_out_the_class_token(
    tmp_path: Path, pooling: dict[str, object], said: dict[str, str], others: dict[str, object]
) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", **{**TIMM_SHAPE, **pooling, **others}).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = load_model(saved(tmp_path, theirs.state_dict()), heads=4, **said)
    torch.testing.assert_close(model(IMAGES.float()), theirs(IMAGES.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({"class_token": False, "global_pool": "avg"}, "give preset=timm:NAME, or act=gelu"),
        ({"global_pool": "map"}, r"not read: attn_pool\.latent"),
        ({"global_pool": "avg", "final_norm": False}, r"missing: norm\.weight"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_other_heads_of_timm_are_refused(tmp_path: Path, options: dict[str, object], unread: str) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", **{**TIMM_SHAPE, **options})
    with pytest.raises(CheckpointError, match=unread):
        load_model(saved(tmp_path, theirs.state_dict()), heads=4, pool="mean")


@pytest.mark.parametrize("attn", choices("attn"))
@pytest.mark.parametrize("stem", ["conv", "cnn", "rearrange"])
def test_own_names_without_a_description(tmp_path: Path, attn: str, stem: str) -> None:
    torch.manual_seed(0)
    form = {"attn": attn, "stem": stem, "registers": 2, "layer_scale": 0.5}
    model = DeepViT(**VIT_PYTORCH_SHAPE, dim_head=8, **form).eval()
    options = {"heads": 3, "transform_scale": False, "residual_scale": 1.0}
    loaded = load_model(saved(tmp_path, model.state_dict()), norm_eps=1e-5, **options)
    assert torch.equal(loaded(IMAGES.float()), model(IMAGES.float()))


def test_norm_and_sharing_of_theta_are_seen(tmp_path: Path) -> None:
    from dataclasses import replace

    from deepvit_train.config.preset import attention_preset

    for norm in ThetaNorm:
        attn = replace(attention_preset("reattention"), norm=norm)
        model = DeepViT(**VIT_PYTORCH_SHAPE, attn=attn, stem="conv").eval()
        loaded = load_model(saved(tmp_path, model.state_dict()), norm_eps=1e-5)
        assert loaded.attn.norm == norm
        assert torch.equal(loaded(IMAGES.float()), model(IMAGES.float()))
    model = DeepViT(**VIT_PYTORCH_SHAPE, attn=replace(attn, norm=ThetaNorm.layer, theta_shared=True)).eval()
    loaded = load_model(saved(tmp_path, model.state_dict()))
    assert loaded.attn.theta_shared
    assert torch.equal(loaded(IMAGES.float()), model(IMAGES.float()))


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | names).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks__1__norm1__weight": None}, r"missing: blocks\.1\.norm1\.weight"),
        ({"pos_embed": None}, "lacks pos_embed"),
        ({"extra": torch.zeros(1)}, "not read: extra"),
        ({"blocks__0__extra": torch.zeros(1)}, r"not read: blocks\.0\.extra"),
        ({"head_other__weight": torch.zeros(5, 24)}, r"not read: head_other\.weight"),
        ({"blocks__1__norm1__weight": torch.zeros(7)}, r"blocks\.1\.norm1\.weight is \(7,\), not \(24,\)"),
        ({"pos_embed": torch.zeros(1, 12, 24)}, "12 positions"),
        ({"pos_embed": torch.zeros(1)}, r"pos_embed has shape \(1,\)"),
        ({"blocks__9__norm1__weight": torch.zeros(24)}, "not all blocks from 0 on"),
        ({"blocks__0__attn__qkv__weight": torch.zeros(70, 24)}, "70 rows"),
        ({"patch_embed__proj__weight": torch.zeros(24, 3, 4, 8)}, "4 x 8"),
        ({"blocks__0__attn__reatten_matrix__weight": torch.zeros(3, 3)}, "not a 1x1"),
        ({"head__weight": torch.zeros(1, 1).expand(10**6, 10**6)}, r"dense tensors: head\.weight"),
        ({"epoch": 3}, "dense tensors: epoch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_dict_that_does_not_fit_is_explained(
    tmp_path: Path, changes: dict[str, Tensor], message: str
) -> None:
    file = saved(tmp_path, changed(authors_state(), **changes))
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(file)
    assert str(file) in str(error.value)


def test_what_one_says_is_checked(tmp_path: Path) -> None:
    file = saved(tmp_path, authors_state())
    with pytest.raises(ConfigError, match="depth: can't be chosen for a weights file"):
        load_model(file, depth=3)
    with pytest.raises(ConfigError, match="did you mean 'deepvit_s'"):
        load_model(file, preset="deepvit_ss")
    with pytest.raises(CheckpointError, match=r"heads=4, but blocks\.0\.attn\.theta has 3"):
        load_model(file, heads=4)
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="has no layout"):
        load_model(saved(tmp_path, {"conv1.weight": torch.zeros(3)}))


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> object:
        return open, (str(self.file), "w")


def _pickled(tensor: tuple[object, ...]) -> bytes:
    """The pickle of {'head.weight': a tensor rebuilt from (storage, offset, size, stride)}."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: object) -> object:
            return value[1:] if isinstance(value, tuple) and value[:1] == ("persistent",) else None

    class Rebuilt:
        def __reduce__(self) -> object:
            return torch._utils._rebuild_tensor_v2, (*tensor, False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"head.weight": Rebuilt()})
    return buffer.getvalue()


def _huge_zip(file: Path) -> None:
    """A file of torch.save whose pickle claims 10^12 elements in a record of one."""
    plain = io.BytesIO()
    torch.save({"head.weight": torch.zeros(1)}, plain)
    storage = ("persistent", "storage", torch.FloatStorage, "0", "cpu", 10**12)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = _pickled((storage, 0, (10**6, 10**6), (10**6, 1)))
            target.writestr(entry.filename, content)


def _huge_legacy(file: Path) -> None:
    """The same in torch's format before 1.6: five pickles, then the storages."""
    storage = ("persistent", "storage", torch.FloatStorage, "0", "cpu", 10**12, None)
    parts = [
        pickle.dumps(torch.serialization.MAGIC_NUMBER, 2),
        pickle.dumps(torch.serialization.PROTOCOL_VERSION, 2),
        pickle.dumps({"protocol_version": 1001, "little_endian": sys.byteorder == "little"}, 2),
        _pickled((storage, 0, (10**6, 10**6), (10**6, 1))),
        pickle.dumps(["0"], 2),
        struct.pack("<q", 10**12),
    ]
    file.write_bytes(b"".join(parts))


def _bomb_zip(file: Path) -> None:
    """A zip whose records unpack to far more than the file holds."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))


def _huge_safetensors(file: Path) -> None:
    header = {"head.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


def _truncated_zip(file: Path) -> None:
    torch.save(authors_state(), file)
    file.write_bytes(file.read_bytes()[:-1000])


def _truncated_legacy(file: Path) -> None:
    torch.save(authors_state(), file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:-1000])


def _truncated_safetensors(file: Path) -> None:
    save_file(authors_state(), file)
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_huge_zip, "damaged"),
        (_huge_legacy, "claims 4,000,000,000,000 bytes"),
        (_bomb_zip, "claims 100,000,000 bytes"),
        (_huge_safetensors, "can't be read"),
        (_truncated_zip, "damaged"),
        (_truncated_legacy, "damaged"),
        (_truncated_safetensors, "can't be read"),
        (lambda file: file.write_bytes(b""), "an empty file"),
        (lambda file: file.write_bytes(b"PK\3\4 and no more"), "damaged"),
        (lambda file: file.write_bytes(b"\xff" * 8 + b"{}"), "can't be read"),
        (lambda file: torch.save([torch.zeros(1)], file), "holds a list"),
        (lambda file: torch.save({}, file), "holds no tensors"),
        (lambda file: torch.save({3: torch.zeros(1)}, file), "dense tensors: 3"),
        (
            lambda file: torch.save({"state_dict": {"a": torch.zeros(2).to_sparse()}}, file),
            "dense tensors: a",
        ),
        (lambda file: torch.save(torch.nn.Linear(2, 2), file), r"holds more than tensors.*nothing of it was"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_file_is_refused(tmp_path: Path, write, message: str) -> None:
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(file)
    assert str(file) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(tmp_path: Path, zipped: bool) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"state_dict": Bomb(trace)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="nothing of it was executed"):
        load_model(file)
    file.write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(CheckpointError):
        load_model(file)
    assert not trace.exists()


def test_a_description_that_lies_is_caught_before_memory_is_taken(tmp_path: Path) -> None:
    from deepvit_train.config.preset import model_preset, plain_from
    from deepvit_train.run.description import DESCRIPTION

    preset = model_preset("deepvit_16b")
    tensors = float_state(authors_state())
    for changes in ({"depth": 4096}, {"dim": 60000}, {"image_size": 8192}):
        described = {"model": plain_from(preset.model) | changes, "attn": plain_from(preset.attn)}
        file = tmp_path / "model.safetensors"
        save_file(tensors, file, metadata={DESCRIPTION: json.dumps(described)})
        with pytest.raises(CheckpointError, match=r"blocks|does not fit"):
            load_model(file)
