"""Start from weights that timm has in a cache: the right file, the right heads, and no download unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from deepvit_train.config.preset import Architecture, attention_preset, model_preset
from deepvit_train.error import CheckpointError
from deepvit_train.models import DeepViT, load_model, start_from
from deepvit_train.models.importer import timm_cache
from tests.conftest import QUICK, Command

NAME = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=5).state_dict()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]) -> Path:
    """A cache of the hub that holds NAME, in the hub's own layout; nothing can be fetched."""
    import huggingface_hub.constants

    home = tmp_path / "hub"
    repository = home / f"models--timm--{NAME}.fb_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(tensors, file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return file


def built(preset: str, attn: str | None = None) -> DeepViT:
    architecture = model_preset(preset)
    chosen = architecture.attn if attn is None else attention_preset(attn)
    return DeepViT(Architecture(architecture.model, chosen), num_classes=5)


def test_weights_are_read_from_timms_cache(hub: Path, tensors: dict[str, torch.Tensor]) -> None:
    model = built("deit_tiny")
    start = start_from(model, f"timm:{NAME}")
    assert (start.file, start.notes) == (hub, [])
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_another_mean_than_that_of_the_weights_is_told(hub: Path) -> None:
    start = start_from(built("vit_tiny", "reattention"), f"timm:{NAME}")
    assert start.notes[0].startswith("fresh in 12 blocks: attn.theta, attn.theta_bias, attn.norm.weight")
    told = "the initial weights were trained with model.mean=[0.485,0.456,0.406], not [0.5, 0.5, 0.5]"
    assert f"\nwarning: {told}\n" in str(start)


def test_weights_of_torch_hub_are_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensors: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    described = timm_cache.known(NAME)
    assert described is not None
    assert isinstance(described.url, str)
    file = tmp_path / "hub" / "checkpoints" / described.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    torch.save({"model": tensors}, file)
    monkeypatch.setattr(timm_cache, "_in_hub", lambda described: None)
    assert start_from(built("deit_tiny"), f"timm:{NAME}").file == file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "is not in timm's cache .*download=true fetches it"),
        ("vit_tinny_patch16_224", "timm has no weights of vit_tinny_patch16_224; did you mean 'vit_tiny"),
        (f"{NAME}.nonsense", "timm has no weights of"),
        ("resnet18.a1_in1k", "is not in timm's cache"),
    ],
)
def test_nothing_is_downloaded_unless_asked_for(
    hub: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(timm_cache, "_fetched", lambda described: pytest.fail("was fetched"))
    with pytest.raises(CheckpointError, match=rf"^model\.weights=timm:{name}: {message}"):
        start_from(built("deit_tiny"), f"timm:{name}")


def test_a_download_that_fails_is_explained(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("timm.models._hub.download_cached_file", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(CheckpointError, match=r"can't be fetched \(no network\)"):
        start_from(built("deit_tiny"), "timm:vit_tiny_patch16_224", download=True)


@pytest.mark.parametrize("told_by", ["name", "config.json", "shape"])
def test_other_heads_than_those_of_the_file_are_refused(
    hub: Path, tensors: dict[str, torch.Tensor], tmp_path: Path, told_by: str
) -> None:
    """The tensors fit any number of heads that divides the width."""
    architecture = model_preset("deit_tiny")
    architecture.model.heads = 12
    model, path = DeepViT(architecture, num_classes=5), f"timm:{NAME}"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if told_by != "name":
        path = str(tmp_path / "file.safetensors")
        save_file(tensors, path)
    if told_by == "config.json":
        (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME}))
    with pytest.raises(
        CheckpointError, match=r"has 3 heads, as .*, not model\.heads=12; nearest: model\.heads=3"
    ):
        start_from(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_preset_with_other_heads_is_not_believed(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "file.safetensors")
    path = tmp_path / "file.safetensors"
    with pytest.raises(CheckpointError, match=r"preset= has 12 heads.* \(model=deit_tiny has its"):
        load_model(path, preset="deepvit_16b")
    with pytest.raises(CheckpointError, match=r"give heads= or preset= \(model=deit_tiny has its"):
        load_model(path)
    assert load_model(path, preset="deit_tiny").heads == load_model(path, heads=3).heads == 3
    assert load_model(path, preset="deepvit_16b", heads=12).heads == 12


@pytest.mark.runs
def test_a_run_starts_from_them(hub: Path, call: Command, image_folder: Path) -> None:
    small = [
        "model=deit_tiny",
        "attn=reattention",
        "trainer.batch_size=8",
        "trainer.max_steps=1",
        "run_dir=r",
    ]
    typed = [*QUICK[4:], *small, f"data.root={image_folder}"]
    done = call("train", *typed, f"model.weights=timm:{NAME}")
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stdout.split())
    assert f"initial weights: {hub}"[:40] in told
    assert (
        "fresh head of 3 classes, not 5; fresh in 12 blocks: attn.theta, attn.theta_bias, attn.norm" in told
    )
    missing = call("train", *typed, "model.weights=timm:vit_tiny_patch16_224", "run_dir=other")
    assert missing.returncode == 3
    assert "download=true" in missing.stderr
