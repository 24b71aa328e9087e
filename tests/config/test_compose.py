"""Configuration: what is shipped composes and builds, what is wrong is named with the nearest right one."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from deepvit_train.commands.sweep import expand
from deepvit_train.config.compose import COMMANDS, compose_command, compose_tree, flat_values, keys_of, plain
from deepvit_train.config.preset import Architecture, choices, config_dir, model_preset
from deepvit_train.error import ConfigError
from deepvit_train.models import DeepViT

FOLDER = ["data=imagefolder", "data.root=/data"]
SHIPPED = [
    *[["attn=" + name] for name in choices("attn")],
    *[["model=" + name] for name in choices("model")],
    *[["augment=" + name] for name in choices("augment")],
    *[["experiment=" + name, "data.root=/data", "model.weights=file"] for name in choices("experiment")],
    FOLDER,
]


@pytest.mark.parametrize("overrides", SHIPPED, ids=" ".join)
def test_every_shipped_choice_composes_and_builds(overrides: list[str]) -> None:
    config = compose_command("train", overrides)
    with torch.device("meta"):
        model = DeepViT(Architecture(config.model, config.attn), num_classes=10)
    assert len(model.blocks) == config.model.depth


def test_every_yaml_file_is_reached() -> None:
    reached = {"train", "eval", "default", "adamw", "cosine"}
    for group in ("attn", "model", "augment", "experiment", "data", "study", "recipe"):
        reached |= set(choices(group))
    assert {file.stem for file in config_dir().rglob("*.yaml")} <= reached | set(COMMANDS)


@pytest.mark.parametrize("name", choices("model"))
def test_python_and_hydra_read_the_same_preset(name: str) -> None:
    config = compose_command("train", [f"model={name}"])
    assert Architecture(config.model, config.attn) == model_preset(name)


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_opens_with_its_command(name: str) -> None:
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    assert f"#     deepvit-train experiment={name} data.root=" in text
    assert "not measured" in text


def test_attention_and_model_are_chosen_apart() -> None:
    config = compose_command("train", ["model=deepvit_s", "attn=self", "model.depth=20"])
    assert (config.attn.kind, config.model.depth, config.model.dim) == ("self", 20, 396)


def test_an_image_folder_is_cropped_and_flipped_unless_told_otherwise() -> None:
    assert compose_command("train", FOLDER).augment.flip == 0.5
    assert compose_command("train", [*FOLDER, "augment=none"]).augment.flip == 0.0
    assert compose_command("train", []).augment.flip == 0.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attn=reatention"], "attn=reatention: unknown; did you mean 'reattention'?"),
        (["model=deepvit_x"], "did you mean 'deepvit_"),
        (["experiment=deepvit"], "experiment=deepvit: unknown"),
        (["model.depht=3"], "model.depht: no such key; did you mean 'model.depth'?"),
        (["epochs=3"], "did you mean 'trainer.epochs'?"),
        (["+model.typo=1"], "model.typo: no such key"),
        (["model.depth=many"], "model.depth=many: must be int"),
        (["model.depth=0"], "model.depth=0: must be at least 1"),
        (["model.depth=-3"], "model.depth=-3: must be at least 1"),
        (["model.depth=1e12"], "model.depth"),
        (["model.dim=100000000"], "model.dim=100000000: must be at most"),
        (["model.pool=max"], "model.pool=max: must be cls|mean"),
        (["model.image_size=17"], "not divisible by model.patch_size=4; nearest: model.image_size=16"),
        (["model.dim=66"], "model.dim=66 is not divisible by model.heads=4"),
        (["model.mean=[0.5]"], "needs three numbers"),
        (["attn.from_block=6"], "attn.from_block=6 is beyond model.depth=6"),
        (["optim.lr=nan"], "optim.lr=nan: must be a finite number"),
        (["optim.lr=inf"], "optim.lr=inf: must be a finite number"),
        (["optim.lr=-1"], "must be at least 0"),
        (["trainer.precision=fp8"], "trainer.precision=fp8: must be fp32|bf16|fp16"),
        (["trainer.batch_size=10", "trainer.accumulate=3"], "not divisible by trainer.accumulate=3"),
        (["trainer.epochs=4"], "schedule.warmup_epochs=5 leaves nothing of trainer.epochs=4"),
        (["experiment=deepvit_s"], "data.root is not given"),
        (["experiment=linear_probe", "data.root=/data"], "model.weights is not given"),
        (["optim.freeze_blocks=7"], "optim.freeze_blocks=7 is more than model.depth=6"),
        (["optim.layer_decay=0"], "optim.layer_decay=0.0: must be greater than 0"),
        (["loss.cosine_weight=0.1", "model.depth=1"], "nearest: model.depth=2"),
        (["loss.cosine_axis=keys"], "loss.cosine_axis=keys: must be heads|queries"),
        (["data=imagefolder"], "data.root is not given"),
        (["model.depth"], "not of the form key=value"),
        (["name=a/b"], "must not hold '/'"),
        (["seed=null"], "seed"),
        (["model.depth=[1,2]"], "model.depth"),
        (["trainer=null"], "trainer"),
        (["model.depth=${oc.env:HOME}"], "model.depth"),
        (["name=\x1b[31m"], "can't be read"),
        (["name='a\tb'"], "control characters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_command("train", overrides)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_a_composed_configuration_is_plain_yaml() -> None:
    config = compose_command("train", [])
    assert yaml.safe_load(yaml.safe_dump(plain(config))) == plain(config)


def test_help_is_quick_complete_and_free_of_torch() -> None:
    script = (
        "import sys; from deepvit_train.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.stderr.write(str('torch' in sys.modules))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, "train", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - start < 3  # 0.5 s on an idle machine; the margin is for a busy one
    assert done.returncode == 0
    assert done.stderr == "False"
    for key in keys_of(COMMANDS["train"]):
        assert f"  {key.name} (" in done.stdout
        assert key.help in done.stdout
    broken = subprocess.run([sys.executable, "-c", script, "train", "attn=x"], capture_output=True, text=True)
    assert broken.returncode == 2
    assert broken.stderr.endswith("False")


def test_each_value_is_shown_by_its_key() -> None:
    values = flat_values(compose_tree("train", []))
    assert set(values) == {key.name for key in keys_of(COMMANDS["train"])}
    assert values["run_dir"] == "runs/digits-reattention-d6-s0"


def test_a_sweep_makes_a_run_of_each_combination_with_a_name_of_its_own() -> None:
    jobs = expand(["model.depth=4,8", "attn=self,reattention"])
    assert len(jobs) == 4
    names = [compose_command("train", job).name for job in jobs]
    assert len(set(names)) == 4
    named = [compose_command("train", job).name for job in expand(["optim.lr=1e-3,2e-3", "name=try"])]
    assert named == ["try-lr0.001", "try-lr0.002"]
    # A folder is named after them: no slash leads out of runs/, and no two are one.
    folders = expand(["data=imagefolder", "data.root=/a/x,/a-x,/a//x", "name=try"])
    named = [compose_command("train", job).name for job in folders]
    assert named == ["try-root_a_x-1", "try-root_a-x", "try-root_a_x-3"]


def test_configs_are_found_in_a_checkout() -> None:
    assert config_dir() == Path(__file__).parents[2] / "configs"
