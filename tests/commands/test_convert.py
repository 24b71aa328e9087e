"""Run `deepvit-convert` and `deepvit-eval` on weights of other projects, as a user does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from vit_pytorch.deepvit import DeepViT as VitPytorchDeepViT

from deepvit_train.cli import main
from deepvit_train.commands import convert, evaluate, train
from deepvit_train.config.compose import compose_command
from deepvit_train.config.preset import model_preset
from deepvit_train.data.index import scan_split
from deepvit_train.data.loaders import Loaders
from deepvit_train.distributed.world import World
from deepvit_train.error import CheckpointError, ConfigError, DataError, OutputError
from deepvit_train.models import load_model
from tests.conftest import QUICK
from tests.models.reference import authors_logits, authors_state

CNN = {"cnn": True, "from_block": 1, "classes": 3, "image_size": 32, "patch_size": 8}


def saved(folder: Path, content: object, name: str = "deepvit.pth.tar") -> Path:
    torch.save(content, folder / name)
    return folder / name


def converted(source: Path, out: Path, *overrides: str) -> dict[str, object]:
    return convert.run(compose_command("convert", [f"source={source}", f"out={out}", *overrides]))


def evaluated(path: Path, *overrides: str) -> dict[str, object]:
    return evaluate.run(compose_command("eval", [f"checkpoint={path}", *overrides]))


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code of a command and what it says on stderr."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0), capsys.readouterr().err


def test_a_converted_file_needs_no_more_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = authors_state(**CNN)
    report = converted(saved(tmp_path, {"state_dict": state}), tmp_path / "out", "preset=deepvit_s")
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == report
    assert report["layout"] == "the authors'"
    assert report["classes"] == 3
    assert "32 px, patch 8, cnn stem, dim 24, 3 blocks, 3 heads, mlp_ratio 3; blocks from 1 on mix" in said
    assert "transform_scale=True residual_scale=0.5" in said
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = authors_logits(state, images, heads=3, residual_scale=0.5, transform_scale=True)
    for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        torch.testing.assert_close(load_model(path)(images), expected, rtol=1e-10, atol=1e-10)


def test_mean_pooling_and_the_head_count_come_from_the_command_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = VitPytorchDeepViT(
        image_size=16, patch_size=4, num_classes=5, dim=24, depth=2, heads=3, mlp_dim=40, pool="mean"
    ).eval()
    converted(saved(tmp_path, theirs.state_dict()), tmp_path / "a", "pool=mean", "mean=[0.1,0.2,0.3]")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(load_model(tmp_path / "a")(images), theirs(images), rtol=1e-5, atol=1e-5)
    plain = saved(tmp_path, authors_state(from_block=9))
    with pytest.raises(CheckpointError, match="give heads="):
        converted(plain, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    converted(plain, tmp_path / "b", "heads=3")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    source = saved(tmp_path, authors_state())
    with pytest.raises(OutputError, match="holds something already"):
        converted(source, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="can't be written"):
        converted(source, tmp_path / "file" / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {source.name, "file"}


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        ([], 3, "give preset=deepvit_s"),
        (["preset=deepvit_x"], 2, "preset=deepvit_x: unknown"),
        (["preset=deepvit_s", "heads=5"], 3, "heads=5, but blocks.1.attn.theta has 3 heads"),
        (["heads=0"], 2, "heads=0: must be at least 1"),
        (["preset=deepvit_s", "mean=[0.5]"], 3, "needs three numbers"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], code: int, message: str
) -> None:
    source = saved(tmp_path, authors_state(**CNN))
    found, said = complaint(capsys, "convert", f"source={source}", f"out={tmp_path / 'out'}", *overrides)
    assert found == code
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_foreign_file_is_evaluated_as_its_preset_says(tmp_path: Path, image_folder: Path) -> None:
    state = authors_state(**CNN)
    file = saved(tmp_path, {"state_dict": state})
    index = scan_split(image_folder, "val", follow_links=False)
    config = compose_command("train", ["model=deepvit_s", "model.image_size=32", "data.workers=0"])
    loaders = Loaders(config.model.preprocessing, config.data, World(0, 1, torch.device("cpu")))
    (batch,) = loaders.evaluation(index, len(index))
    images = batch.images
    logits = authors_logits(state, images.double(), heads=3, residual_scale=0.5, transform_scale=True)
    hits = (logits.argmax(1) == torch.as_tensor(index.targets[:])).double().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, torch.as_tensor(index.targets[:]).long()).item()

    where = ["data=imagefolder", f"data.root={image_folder}", "data.workers=0", "threads=1", "batch_size=4"]
    converted(file, tmp_path / "out", "preset=deepvit_s")
    for report in (evaluated(file, "preset=deepvit_s", *where), evaluated(tmp_path / "out", *where)):
        assert report["top1"] == pytest.approx(hits)
        assert report["loss"] == pytest.approx(loss, rel=1e-4)
    with pytest.raises(ConfigError, match="data is not given"):
        evaluated(file, "preset=deepvit_s")
    other = saved(tmp_path, authors_state(**{**CNN, "classes": 4}))
    with pytest.raises(DataError, match=r"3 classes, but the model of .* has 4"):
        evaluated(other, "preset=deepvit_s", *where)


def test_a_run_becomes_one_file_with_its_calibrated_statistics(tmp_path: Path, digits: Path) -> None:
    run = tmp_path / "run"
    train.run(compose_command("train", [*QUICK, f"run_dir={run}", "trainer.ema_decay=0.9"]))
    options = ["threads=1", "limit_batches=6"]
    for weights in ("live", "ema"):
        out = tmp_path / weights
        converted(run, out, f"weights={weights}")
        expected = evaluated(run, f"weights={weights}", *options)
        report = evaluated(out, *options)
        for name in ("top1", "loss", "images"):
            assert report[name] == expected[name]
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(load_model(run)(images), load_model(tmp_path / "ema")(images))


@pytest.mark.parametrize("command_name", ["eval", "convert"])
def test_a_bad_file_ends_with_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command_name: str
) -> None:
    file = tmp_path / "bad.pth"
    file.write_bytes(b"PK\3\4 and no more")
    given = {"eval": [f"checkpoint={file}"], "convert": [f"source={file}", f"out={tmp_path / 'out'}"]}
    code, said = complaint(capsys, command_name, *given[command_name])
    assert code == 3
    assert said.startswith(f"error: {file}: not a weights file, or a damaged one")
    assert len(said.splitlines()) == 1


def test_a_preset_of_every_name_can_be_said(tmp_path: Path) -> None:
    for name in ("deepvit_16b", "deepvit_l"):
        model = converted(saved(tmp_path, authors_state(**CNN)), tmp_path / name, f"preset={name}")
        assert model["parameters"] > 0
        described = load_model(tmp_path / name)
        assert described.blocks[0].residual_scale == model_preset(name).model.residual_scale
