"""Use the names `reattention_seed` and `seed` of version 0.1 wherever a name can be given."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepvit_train.cli import main
from deepvit_train.commands import bench
from deepvit_train.commands.study import cells_of, commands_of
from deepvit_train.commands.sweep import expand
from deepvit_train.config.alias import RENAMED, current, current_override
from deepvit_train.config.command import keys_of
from deepvit_train.config.compose import compose_command
from deepvit_train.config.model import AttentionKind, Init
from deepvit_train.config.preset import attention_preset, choices
from deepvit_train.config.recipe import Compile
from deepvit_train.models import DeepViT, load_model
from deepvit_train.run.folder import RunFolder
from tests.conftest import QUICK, Command

FORMER, TODAY = "reattention_seed", "reattention_vit_pytorch"
SHAPE = {"image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2}


def test_every_former_name_has_a_successor_and_is_offered_no_more() -> None:
    today = {"attn": choices("attn"), "attn.kind": list(AttentionKind), "model.init": list(Init)}
    today |= {"trainer.compile": list(Compile), "compile": list(Compile)}
    assert today.keys() == RENAMED.keys()
    for key, names in RENAMED.items():
        for former, successor in names.items():
            assert successor in today[key]
            assert former not in today[key]
            assert current(key, former) == current(key, successor) == successor


def test_a_truth_value_of_compile_is_understood() -> None:
    assert compose_command("train", ["trainer.compile=true"]).trainer.compile == Compile.default
    assert compose_command("train", ["trainer.compile=false"]).trainer.compile == Compile.none
    assert current("trainer.compile", True) == "default"  # a run's config.yaml of version 0.1
    assert [each.mode for each in Compile] == [None, "default", "reduce-overhead", "max-autotune"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("attn=reattention_seed", "attn=reattention_vit_pytorch"),
        ("attn.kind=reattention_seed", "attn.kind=reattention_vit_pytorch"),
        ("model.init=seed", "model.init=vit_pytorch"),
        ("model.init='seed'", "model.init=vit_pytorch"),
        ("seed=3", "seed=3"),
        ("name=reattention_seed", "name=reattention_seed"),
        ("model.init", "model.init"),
    ],
)
def test_an_override_is_read_as_its_name_of_today(typed: str, meant: str) -> None:
    assert current_override(typed) == meant


@pytest.mark.parametrize("command", ["train", "data-check", "bench"])
def test_command_lines(command: str) -> None:
    given = ["root=x", "data.root=x"] if command == "data-check" else []
    former, today = (
        compose_command(command, [*given, f"attn={name}", f"model.init={init}"])
        for name, init in ((FORMER, "seed"), (TODAY, "vit_pytorch"))
    )
    assert former == today
    assert (today.attn.kind, today.model.init) == (TODAY, "vit_pytorch")


def test_help_and_suggestions_give_the_name_of_today(capsys: pytest.CaptureFixture[str]) -> None:
    assert not [key for key in keys_of(type(compose_command("train", []))) if FORMER in key.type]
    with pytest.raises(SystemExit) as end:
        main(["train", "attn=reattention_sead"])
    assert end.value.code == 2
    assert FORMER not in capsys.readouterr().err


def test_contenders_of_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.depth=1", "model.dim=16", "model.heads=2", "batch_size=2", "repeats=1", "threads=1"]
    config = compose_command("bench", [*overrides, f"contenders=[{FORMER},{FORMER}_formula]"])
    for name in config.contenders:
        former, today = (
            bench.build_contender(each, config, config.model).state_dict()
            for each in (name, name.replace(FORMER, TODAY))
        )
        assert former.keys() == today.keys()
    rows = bench.run(config)["rows"]
    assert [row["contender"] for row in rows] == [FORMER, f"{FORMER}_formula"]


def test_a_study_and_a_sweep(tmp_path: Path) -> None:
    overrides = [f"study.attentions=[{FORMER}]", "study.widths=[]", "study.rates=[]"]
    config = compose_command("study", ["root=x", f"out={tmp_path}", *overrides])
    cell = next(cells_of(config.study))
    assert cell.name.startswith(FORMER)  # so the cells of a study that version 0.1 began are found
    assert compose_command("train", commands_of(cell, config)["train"]).attn.kind == TODAY

    jobs = expand([f"attn=self,{FORMER}", "model.init=vit,seed"])
    configs = [compose_command("train", job) for job in jobs]
    assert [(each.attn.kind, each.model.init) for each in configs] == [
        ("self", "vit"),
        ("self", "vit_pytorch"),
        (TODAY, "vit"),
        (TODAY, "vit_pytorch"),
    ]


def test_python() -> None:
    assert attention_preset(FORMER) == attention_preset(TODAY)
    model = DeepViT(**SHAPE, mlp_dim=24, attn=FORMER, init="seed")
    assert model.attn.kind == TODAY
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    assert timm.create_model("deepvit_16b", attn=FORMER, init="seed", **small).attn.kind == TODAY


def _with_former_names(file: Path) -> None:
    """Have a weights file describe its model as version 0.1 did."""
    with safe_open(file, framework="pt") as opened:
        header = dict(opened.metadata())
    description = json.loads(header["deepvit_train"])
    assert (description["attn"]["kind"], description["model"]["init"]) == (TODAY, "vit_pytorch")
    description["attn"]["kind"], description["model"]["init"] = FORMER, "seed"
    save_file(load_file(file), file, metadata={"deepvit_train": json.dumps(description, sort_keys=True)})


@pytest.mark.parametrize("named", ["run_dir", "by default"])
def test_a_run_of_version_0_1_goes_on_by_either_spelling(call: Command, named: str) -> None:
    old = Path("runs/digits-reattention_seed-d2-s0" if named == "by default" else "old")
    where = [] if named == "by default" else ["run_dir=old"]
    begun = call("train", *QUICK, f"attn={TODAY}", "model.init=vit_pytorch", f"run_dir={old}")
    assert begun.returncode == 0, begun.stderr
    config = yaml.safe_load((old / "config.yaml").read_text())
    config["attn"]["kind"], config["model"]["init"] = FORMER, "seed"
    config["name"] = "digits-reattention_seed-d2-s0"
    (old / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for number, (name, init) in enumerate(((FORMER, "seed"), (TODAY, "vit_pytorch"))):
        more = [f"attn={name}", f"model.init={init}", f"trainer.epochs={3 + number}", *where]
        done = call("train", *QUICK, *more)
        assert done.returncode == 0, done.stderr
        assert "resumed from" in done.stdout
        assert f"run folder: {old}" in done.stdout
    assert not Path("runs/digits-reattention_vit_pytorch-d2-s0").exists()
    stored = yaml.safe_load((old / "config.yaml").read_text())
    assert (stored["attn"]["kind"], stored["model"]["init"]) == (TODAY, "vit_pytorch")

    refused = call("train", *QUICK, "attn=self", "run_dir=" + str(old))
    assert refused.returncode == 2
    assert f"attn.kind={TODAY} (now self)" in refused.stderr


@pytest.mark.parametrize("named", [TODAY, FORMER])
def test_a_run_that_was_named_without_its_data_set_is_found(named: str, tmp_path: Path) -> None:
    """As version 0.1 named it; but not if it read other data."""
    flowers = ["data=imagefolder", "model=digits", "data.root=/x/flowers"]
    config = compose_command("train", [*flowers, f"attn={TODAY}"])
    path, old = tmp_path / config.name, tmp_path / f"imagefolder-{named}-d6-s0"
    assert RunFolder(str(path), config.data).path == path
    old.mkdir()
    assert RunFolder(str(path), config.data).path == path  # nothing says what it is
    for root, found in (("/x/flowers/", old), ("/y/flowers", path), (None, path)):
        (old / "config.yaml").write_text(yaml.safe_dump({"data": {"root": root}}))
        assert RunFolder(str(path), config.data).path == found
    (old / "config.yaml").write_text(yaml.safe_dump({"data": {"root": "/x/flowers"}}))
    path.mkdir()
    assert RunFolder(str(path), config.data).path == path


def test_a_weights_file_of_version_0_1(call: Command) -> None:
    done = call("train", *QUICK, f"attn={TODAY}", "model.init=vit_pytorch", "run_dir=run")
    assert done.returncode == 0, done.stderr
    today = load_model("run")
    file = Path("old.safetensors")
    file.write_bytes(next(Path("run/checkpoints/last").glob("model.safetensors")).read_bytes())
    _with_former_names(file)
    former = load_model(file)
    assert asdict(former.attn) == asdict(today.attn)
    evaluated = call(
        "eval", f"checkpoint={file}", "data=digits", "threads=1", "data.workers=0", "report=false"
    )
    assert evaluated.returncode == 0, evaluated.stderr
