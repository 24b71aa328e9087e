"""Compose and build every shipped configuration, and read the errors about wrong ones."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from deepvit_train.commands.sweep import expand
from deepvit_train.config.command import COMMANDS, groups_of, keys_of
from deepvit_train.config.compose import compose_command, compose_tree, flat_values, plain
from deepvit_train.config.help import command_help
from deepvit_train.config.preset import Architecture, choices, model_preset
from deepvit_train.config.shipped import config_dir
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
    if config.attn.from_block is None:  # a run finds it in its weights
        config.attn.from_block = 3
    with torch.device("meta"):
        model = DeepViT(Architecture(config.model, config.attn), num_classes=10)
    assert len(model.blocks) == config.model.depth


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_with_every_key(command: str) -> None:
    keys = {key.name for key in keys_of(COMMANDS[command])}
    chosen = groups_of(command).items() if command != "train" else ()  # train's are composed above
    for overrides in [[], *([f"{group}={name}"] for group, names in chosen for name in names)]:
        tree = compose_tree(command, overrides)
        required = {str(key) for key in OmegaConf.missing_keys(tree)}
        assert required <= {"checkpoint", "source", "out", "root", "runs"}
        assert keys == set(flat_values(tree)) | required


def test_every_yaml_file_is_reached() -> None:
    """What is no choice of a command is included by name in another file."""
    folder = config_dir()
    groups = {group for command in COMMANDS for group in groups_of(command)}
    offered = {f"{group}/{name}" for group in groups for name in choices(group)}
    for file in folder.rglob("*.yaml"):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in COMMANDS or name in offered:
            continue
        lines = {line.strip() for other in folder.rglob("*.yaml") for line in other.read_text().splitlines()}
        assert lines & {f"- {name}", f"- {file.stem}", f"- /{file.parent.name}: {file.stem}"}, name


@pytest.mark.parametrize("group", ["attn", "model", "augment", "data", "recipe"])
def test_a_preset_says_only_what_differs_from_the_files_below_it(group: str) -> None:
    for file in (config_dir() / group).glob("*.yaml"):
        own, below = _own_and_below(file)
        repeated = {key: value for key, value in own.items() if key in below and below[key] == value}
        assert repeated == {}, file.name


def _own_and_below(file: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The values that a file says itself, and those that it starts from, by dotted key."""
    content = yaml.safe_load(file.read_text())
    below: dict[str, object] = {}
    for entry in content.pop("defaults", []):
        if isinstance(entry, str):
            said, further = _own_and_below(file.with_stem(entry))
            below |= further | said
    own: dict[str, object] = {}
    for name, value in content.items():
        own |= (
            {f"{name}.{key}": each for key, each in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return own, below


@pytest.mark.parametrize("name", choices("model"))
def test_python_and_hydra_read_the_same_preset(name: str) -> None:
    config = compose_command("train", [f"model={name}"])
    assert Architecture(config.model, config.attn) == model_preset(name)


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_opens_with_its_command_its_cost_and_what_to_expect(name: str) -> None:
    text = (config_dir() / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith(f"# @package _global_\n#     deepvit-train experiment={name} data.root=")
    # A figure, or that there is none.
    assert re.search(r"^# Hardware and time: (not measured|.*\d)", text, flags=re.MULTILINE)
    assert re.search(r"^# Top-1 to expect: (not measured|\d+(\.\d+)?)", text, flags=re.MULTILINE)


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
        (
            ["trainer.epochs=4", "schedule.warmup_epochs=5"],
            "schedule.warmup_epochs=5 leaves nothing of trainer.epochs=4; nearest: schedule.warmup_epochs=3",
        ),
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
        (["name=\udcff"], "can't be read"),
        (["model.mean=[0.5"], "model.mean=[0.5: must be list of float"),
        (["optim.betas=0.9,0.95"], "must be list of float or null; nearest: optim.betas=[0.9,0.95]"),
        (["model.depth=4,8"], "model.depth=4,8: must be int; deepvit-train -m"),
        (
            ["attn.norm=(layer"],
            "attn.norm=(layer: must be batch|layer|centred|attn_scale|none; did you mean 'layer'?",
        ),
        (["model=base"], "model=base: unknown"),
        (["name='a\tb'"], "control characters"),
        (["data.root=${nowhere}", "seed=3"], "data.root=${nowhere}: Interpolation key 'nowhere' not found"),
        (["data.root=\\${x}"], "a text can't hold '${'"),
        (["runs/demo"], "runs/demo: not of the form key=value"),
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


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("1e3", "1e3"),
        ("007", "007"),
        ("1_000", "1_000"),
        ("true", "true"),
        ("/a,b", "/a,b"),
        ("/photos (2)", "/photos (2)"),
        ("[x", "[x"),
        ("/a=b", "/a=b"),
        ("/Größe/写真", "/Größe/写真"),
        ("/it's", "/it's"),
        ("~/x", "~/x"),
        ("'1e3'", "1e3"),
        ('"a b"', "a b"),
        ("a\\,b", "a,b"),
        ("/data-${seed}", "/data-0"),
        ("null", None),
        (" a ", " a "),
        ("trail\\", "trail\\"),
        ("a\\b", "a\\b"),
        ("67217e15", "67217e15"),
        ("3.10", "3.10"),
        ("2025_11_26", "2025_11_26"),
        ("x(1)", "x(1)"),
        ("x=1", "x=1"),
        ("x#1", "x#1"),
        ("a;b", "a;b"),
        ("{a:b}", "{a:b}"),
        ("$HOME", "$HOME"),
        ("*", "*"),
    ],
)
def test_text_stays_text(typed: str, text: str | None) -> None:
    assert compose_command("train", [f"data.root={typed}"]).data.root == text


@pytest.mark.parametrize("text", ["67217e15", "3.10", "2025_11_26", "007", "true", "a=b", "a,b", "x (1)"])
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_every_text_key_takes_text_and_what_is_made_of_it(prefix: str, text: str) -> None:
    config = compose_command("train", [f"{prefix}name={text}", f"{prefix}resume={text}"])
    assert (config.name, config.run_dir, config.resume) == (text, f"runs/{text}", text)
    assert compose_command("train", [f"{prefix}run_dir={text}"]).run_dir == text


@pytest.mark.parametrize(
    ("first", "second"), [("name=1e3", "name=foo"), ("name=foo", "name=1e3"), ("name=a,b", "name=c,d")]
)
def test_of_two_values_the_last_counts(first: str, second: str) -> None:
    assert compose_command("train", [first, second]).name == second.removeprefix("name=")


@pytest.mark.parametrize(
    ("command", "typed", "key"),
    [
        ("eval", "runs/demo", "checkpoint"),
        ("eval", "runs/lr=0.1,x (1)", "checkpoint"),
        ("eval", "größe#1", "checkpoint"),
        ("eval", "r (1),x=2#ö", "checkpoint"),
        ("eval", "ö=1", "checkpoint"),
        ("analyze", "runs/demo", "checkpoint"),
        ("convert", "model.pth.tar", "source"),
        ("data-check", "/data/images", "root"),
        ("study", "/data/images", "root"),
    ],
)
def test_a_path_alone_is_what_the_command_is_about(command: str, typed: str, key: str) -> None:
    others = ["out=x"] if command == "convert" else []
    assert getattr(compose_command(command, [typed, *others]), key) == typed
    for again in ("other", f"{key}=other"):
        with pytest.raises(ConfigError, match=f"{key} is given already"):
            compose_command(command, [typed, again, *others])


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("predict", ["runs/x", "../new"], "../new: checkpoint is given already; did you mean images=../new?"),
        ("predict", ["checkpoint=runs/x", "a"], "a: checkpoint is given already; did you mean images=a?"),
        ("eval", ["runs/x", "new"], "new: checkpoint is given already; did you mean data.root=new?"),
        ("analyze", ["runs/x", "y"], "y: checkpoint is given already; did you mean compare=y?"),
        ("convert", ["a.pth", "b"], "b: source is given already; did you mean out=b?"),
        ("export", ["runs/x", "b"], "b: checkpoint is given already; did you mean out=b?"),
        ("study", ["data", "b"], "b: root is given already; did you mean out=b?"),
        ("data-check", ["data", "b"], "b: root is given already"),
        ("train", ["photos/"], "photos/: not of the form key=value; did you mean data.root=photos/?"),
        ("train", ["model.depth"], "model.depth: not of the form key=value"),
    ],
)
def test_the_key_of_a_second_path_is_named(command: str, typed: list[str], meant: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_command(command, typed)
    assert str(error.value) == meant
    if "did you mean " in meant:  # what is named is a key of the command
        key = meant.split("did you mean ")[1].partition("=")[0]
        assert key in {each.name for each in keys_of(COMMANDS[command])}


@pytest.mark.parametrize(
    ("overrides", "shortened"),
    [
        (["trainer.epochs=1"], 0.5),
        (["trainer.epochs=5"], 2.5),
        (["trainer.epochs=6"], 5),
        ([], 5),
        (["trainer.epochs=5", "schedule.warmup_epochs=3"], 3),
        (["experiment=deepvit_s", "data.root=/data", "trainer.epochs=2"], 1),
        (["experiment=deepvit_s", "data.root=/data"], 5),
    ],
)
def test_a_warm_up_that_nobody_typed_leaves_half_of_a_short_run(
    overrides: list[str], shortened: float
) -> None:
    config = compose_command("train", overrides)
    assert config.schedule.warmup_within(config.trainer.epochs) == shortened


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trainer.lr", "optim.lr"),
        ("modle.depth", "model.depth"),
        ("batch", "trainer.batch_size"),
        ("nmae", "name"),
        ("attnn", "attn"),
        ("Seed", "seed"),
        ("resnet", None),
        ("optim.foo", None),
        ("optim.learning_rate", None),
        ("model.layers", None),
        ("q", None),
        ("k", "collapse.k"),
    ],
)
def test_a_key_is_suggested_only_where_it_is_near(typed: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        compose_command("train", [f"{typed}=1"])
    assert (f"did you mean '{meant}'?" if meant else "no such key (") in str(error.value)


@pytest.mark.parametrize("word", ["resnet50", "swin_t", "x", "base_patch16"])
def test_a_choice_is_suggested_only_where_it_is_near(word: str) -> None:
    with pytest.raises(ConfigError, match="unknown \\(choices"):
        compose_command("train", [f"model={word}"])


def test_text_stays_text_in_a_sweep() -> None:
    jobs = expand(["data.root=/photos (2)", "data=imagefolder", "model.depth=4,8"])
    assert [compose_command("train", job).data.root for job in jobs] == ["/photos (2)"] * 2


def test_a_key_named_like_a_group_of_another_command_is_text() -> None:
    told = ["model=timm:vit_tiny_patch16_224", "data=imagefolder", "data.root=/x", "out=y"]
    assert compose_command("analyze", told).model == "timm:vit_tiny_patch16_224"


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
    printed = " ".join(done.stdout.split())
    for key in keys_of(COMMANDS["train"]):
        assert f"  {key.name} (" in done.stdout
        assert key.help in printed
    broken = subprocess.run([sys.executable, "-c", script, "train", "attn=x"], capture_output=True, text=True)
    assert broken.returncode == 2
    assert broken.stderr.endswith("False")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_opens_with_what_the_command_does_and_has_required_keys_first(command: str) -> None:
    lines = command_help(command).splitlines()
    assert re.fullmatch(r"[A-Z][^.`]*\.", lines[0])
    assert lines[2].startswith(f"usage: deepvit-{command.split('-')[0]}")
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    missing = {str(key) for key in OmegaConf.missing_keys(compose_tree(command, []))}
    assert (headings[0] == "required:") == bool(missing)
    if missing:
        assert lines[lines.index("required:") + 1].split()[0] in missing
    assert len(headings) == len(set(headings))
    assert max(map(len, lines)) <= 100


def test_each_value_is_shown_by_its_key() -> None:
    values = flat_values(compose_tree("train", []))
    assert set(values) == {key.name for key in keys_of(COMMANDS["train"])}
    assert values["run_dir"] == "runs/digits-reattention-d6-s0"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ([], "digits"),
        (["data=digits", "data.root=/photos/digits"], "digits-digits"),
        (["data.root=/photos/digits"], "imagefolder-digits"),
        (["data=imagefolder", "data.root=/photos/digits"], "imagefolder-digits"),
        (["data=imagefolder", "data.root=/photos/digits/"], "imagefolder-digits"),
        (["data=imagefolder", "data.root=/photos/fashion"], "imagefolder-fashion"),
        (["data=tar", "data.root=/photos/fashion"], "tar-fashion"),
        (["data=imagefolder", "data.root=../there/."], "imagefolder-there"),
        (["data=imagefolder", "data.root=/"], "imagefolder"),
        (["data=imagefolder", "data.root=/a, b(2)/Möwe, $1"], "imagefolder-Möwe-1"),
        (["data=imagefolder", f"data.root=/{'x' * 200}"], f"imagefolder-{'x' * 40}"),
    ],
)
def test_the_default_name_of_a_run_holds_its_data_set(data: list[str], name: str) -> None:
    config = compose_command("train", data)
    assert config.name == f"{name}-reattention-d{config.model.depth}-s0"
    assert config.run_dir == f"runs/{config.name}"
    assert compose_command("train", [*data, "name=own"]).run_dir == "runs/own"


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
